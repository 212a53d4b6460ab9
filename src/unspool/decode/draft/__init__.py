"""Drafters: what guesses the next tokens of rows, to be checked in one step (see `decode.sequence.Drafter`).

`lookup` copies what followed the same words earlier in the row, `model` asks a smaller model, or with `layers` the
first layers of the model itself. `words` translates where a draft model has another vocabulary; `rules` says how much.
"""
