"""What a run was, on one page: `record` keeps it while it runs, `fastpost report` shows it."""
