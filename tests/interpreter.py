"""Triton's interpreter, quicker: it took nine tenths of its time for what is done here another way.

Reductions are those of a GPU, halves onto halves and a half at once; its own go lane by lane in Python. And `triton.language` is
patched for each module once, not again with each call of a device function, on which a launch's own patch is still there.
"""

from typing import Any

from triton.runtime import interpreter


def hurry() -> None:
    """From now on; reductions of more than one axis are as they were. Triton's blocks are powers of two."""
    by_lanes = interpreter.ReduceOps.generic_reduce
    patched: set[int] = set()

    def generic_reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
        if self.axis != 0 or self.keep_dims or len(inputs[0].shape) != 1:
            return by_lanes(self, inputs)
        values, kinds = [x.handle.data for x in inputs], [x.dtype for x in inputs]
        while (half := len(values[0]) // 2) > 0:
            halves = [self.to_tensor(x[part], kind) for part in (slice(half), slice(half, None))
                      for x, kind in zip(values, kinds, strict=True)]
            values = [x.handle.data for x in self.combine_fn.fn(*halves)]
        return [self.to_tensor(x.item(), kind) for x, kind in zip(values, kinds, strict=True)]

    def device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.ReduceOps.generic_reduce = generic_reduce
    interpreter.InterpretedFunction.__call__ = device_function
