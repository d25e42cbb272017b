"""What plans and votes cost from 8 to 16,384 ranks.

state   a GPT's training state, as one rank of a world of any size has it
plans   how long a rank plans
merge   how long rank 0 takes to describe what all have written
traffic what crosses the store
votes   how long until all know
page    docs/scale.md
"""
