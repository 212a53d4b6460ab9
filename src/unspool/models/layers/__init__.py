"""The parts that decoders are built of: `linear` (the only place where a weight is multiplied), `embedding`, `norm`,
`rotary` and `activation`. A layer holds weights and no state; what changes from step to step comes in as an argument.
"""
