"""Judges: chat models that grade an answer, check it against a rubric, or choose between two.

`tasks` is what is asked and how a reply is read, `judge` asks one model, `panel` several, weighted
by `agreement`; `delimiting` keeps the text under judgement from being read as instructions, and
`position_bias` measures what a judge makes of the order.
"""
