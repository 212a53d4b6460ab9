"""Native decoders as plain modules that read like their papers.

`base` is what the decoding core knows of a model; `registry` maps `model_type` to a class; `llama` holds the families
built like Llama, described by `llama_config`; `gpt2` is GPT-2. Reading weights from disk lives in `unspool.weights`.
"""
