"""Training rows made by models: Magpie, a teacher on seed topics, and rejection sampling.

`magpie`, `teacher` and `rejection` each make candidate rows, `filters` says which stay and why the
others go, `provenance` writes into every row where it comes from. Give a `CachedChatModel`: seeds
follow from the run's own seed, so a run that was killed, started again, finds every reply that it
had received and goes on from there.
"""
