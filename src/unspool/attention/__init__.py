"""How queries meet stored keys and values: what a step must know (`context`), the PyTorch backend that runs everywhere
(`reference`), and plain attention over a rectangle without any store (`dense`).
"""
