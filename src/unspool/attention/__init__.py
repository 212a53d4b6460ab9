"""How queries meet stored keys and values. `registry` chooses between the compiled kernels (`native`) and the PyTorch
backend that runs everywhere (`reference`, with what a step must know for it in `context`); `dense` is plain attention
over a rectangle without any store.
"""
