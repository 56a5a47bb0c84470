"""Models that answer conversations: behind an endpoint, or on this machine, with a cache on disk.

`interface` is what judges, synthesis and alignment loops ask for, `endpoint` and `local` answer it,
`cache` keeps every reply, `usage` says what calls cost.
"""
