"""What started this process, starting ranks, meeting and failing together."""
