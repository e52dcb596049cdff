"""Linear maps whose weights may have float32 gradients.

A matmul in bfloat16 has gradients in bfloat16. Those of the kernels are sums
over the clips of all devices. With `partition.float32_sums` they are
accumulated, and summed over devices, in float32; values and the other gradients
stay as they are.

Axes: N rows, D inputs, F outputs, S stacked kernels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from marlin_jax.models import partition


def linear(
  x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
  """Returns x @ kernel + bias in the dtype of x: (N, D) -> (N, F)."""
  y = product("nd,df->nf", x, kernel)
  return y if bias is None else add_bias(y, bias)


def product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns an einsum in the dtype of x.

  Args:
    equation: "nd,df->nf" or "nd,sdf->snf".
    x: (N, D).
    kernel: float32, where gradients are to be.
  """
  if partition.float32_sums():
    return _product(equation, x, kernel.astype(jnp.float32))
  return jnp.einsum(equation, x, kernel.astype(x.dtype))


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
  """Returns y + bias in the dtype of y: (N, F) and (F,) -> (N, F).

  The sum is one of float32 values, and so is the bias's gradient: XLA sums
  bfloat16 on GPU as bfloat16.
  """
  return (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation, x, kernel):
  return jnp.einsum(equation, x, kernel.astype(x.dtype))


def _product_forward(equation, x, kernel):
  return _product(equation, x, kernel), (x, kernel)


def _product_backward(equation, residuals, grad):
  x, kernel = residuals
  inputs, out_axes = equation.split("->")
  x_axes, kernel_axes = inputs.split(",")
  grad_x = jnp.einsum(
    f"{out_axes},{kernel_axes}->{x_axes}", grad, kernel.astype(x.dtype)
  )
  grad_kernel = jnp.einsum(
    f"{x_axes},{out_axes}->{kernel_axes}",
    x,
    grad,
    preferred_element_type=jnp.float32,
  )
  return grad_x, grad_kernel


_product.defvjp(_product_forward, _product_backward)
