"""The decoding core: rows of true tokens, one step at a time, for every mode and every front end.

One step is: plan -> build the batch -> run the model -> choose -> commit. `sequence` holds the nouns, `plan` says what
to feed, `batch` builds the model's input, `loop` runs the step, `choose/` decides tokens. Nothing here knows a concrete
model, a tokenizer, a thread or HTTP.
"""
