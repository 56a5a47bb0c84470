"""The parts of proximal policy optimisation that are neither its loss nor its trainer.

`completions` lays sampled rows out and scores them, `critic` holds the values, `reward_scores` asks
reward functions and reward models, `experience` turns all that into advantages and minibatches,
`kl_control` sets the weight of the KL, `prompt_order` says which prompts come next.
"""
