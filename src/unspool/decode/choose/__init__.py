"""How the next tokens are decided from logits: one file per way. `sample`: greedy and multinomial; `beam`: beams."""
