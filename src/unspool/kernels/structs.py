"""What `program.h` says a step is, as ctypes."""

from __future__ import annotations

import ctypes

__all__ = ["Continuation", "Operation", "Step"]


class Operation(ctypes.Structure):
    """`Operation` of `program.h`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "source", "target", "other")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("width", "parts", "stride", "number")),
        *((name, ctypes.c_float) for name in ("first", "second")),
    )


class Step(ctypes.Structure):
    """`Step` of `program.h`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "bytes")),
        *((name, ctypes.c_void_p) for name in ("input", "buffers", "cos", "sin")),
        ("turned", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("plans", "pools", "pairs")),
        ("pair_count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("starts", "places")),
        ("threads", ctypes.c_int64),
    )


class Continuation(ctypes.Structure):
    """`Continuation` of `program.h`."""

    _fields_ = (
        ("embedding", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("form", "hidden", "logits", "vocab")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("known", "rows", "steps")),
        *((name, ctypes.c_void_p) for name in ("given", "chosen", "positions", "plans")),
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("limits", "ends")),
        ("end_count", ctypes.c_int64),
        ("confidence", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("shares", "input", "turned_cos", "turned_sin")),
    )
