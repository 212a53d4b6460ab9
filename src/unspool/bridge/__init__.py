"""Modules that are not ours: any `nn.Module` with the usual `forward`, and those of transformers and PEFT.

`module` reads a module's calling convention and its hooks, `rows` runs it under the core's loop: padded rectangles, and
the module's own kind of past. Nothing is kept on a module. How tokens are decided is the core's business.
"""
