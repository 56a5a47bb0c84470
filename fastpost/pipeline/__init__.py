"""From a base model to an assistant: every stage of a run in one file (`fastpost run RECIPE`).

recipe      what the file says, checked before anything runs
digests     content of files and folders, by which stages know their inputs
runner      skips finished stages, resumes interrupted ones, stops at regressions
commands    each stage as a process of its own, so that its memory is free when it ends
chain       one template, one tokenizer, unchanged references from end to end
evaluation  scores of a model, and what counts as a regression
planned     memory and cost of every stage, predicted before the first
smoke       the same recipe, small enough for a CPU
run_facts   what ran: versions, data, configuration, kernel choices, git state
"""
