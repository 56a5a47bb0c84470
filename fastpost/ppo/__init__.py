"""The parts of proximal policy optimisation that are neither its loss nor its trainer.

`prompt_order` says which prompts come next, `samples` has them completed, `completions` lays the
rows out and scores them, `policy` prepares policy and reference, `critic` holds the values,
`reward_scores` asks reward functions and reward models, `experience` turns all that into advantages
and minibatches, `kl_control` sets the weight of the KL.
"""
