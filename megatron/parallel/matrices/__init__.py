"""Work on whole matrices whose parts are on several ranks: each is gathered on one rank, for Muon.

`sharing` decides which rank owns which matrix, and what is sent to whom; `exchange` sends it and does the work.
"""
