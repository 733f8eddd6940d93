"""Starting ranks, and failing together.

In each rank: `environment` reads what launcher started it, `hosts` checks names, `meeting` finds the other ranks,
`watch` reports ranks that hang, `failure` says why this one failed, `leaving` ends it. The launcher: `agent`, started
by `__main__`, with `stop_signals`; `killed` says why a signal ended a rank; `machines` is where launchers of several
machines meet.
"""
