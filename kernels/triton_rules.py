"""What each element-wise optimizer does to one element, for the walk of ``triton_walk``.

A rule gets the parameter, the gradient (its sign and scale are applied already) and up to three states in fp32, the
hyper-parameters of the group as ``numbers()`` of the group gives them, and the number of this step. It returns the
parameter and three states; those beyond the first ``STATES`` are not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adamw_rule(param, grad, first, second, peak, numbers, count, STATES: tl.constexpr):
    lr, kept, penalty, eps = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    beta1, rest1, beta2, rest2 = tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 8), tl.load(numbers + 9)
    correction1 = one_minus_exp(count * tl.load(numbers + 7))
    correction2 = one_minus_exp(count * tl.load(numbers + 10))
    grad += penalty * param
    param *= kept
    first = beta1 * first + rest1 * grad
    second = beta2 * second + rest2 * grad * grad
    largest = second
    if STATES == 3:
        peak = tl.where(second != second, second, tl.maximum(peak, second))
        largest = peak
    denominator = tl.div_rn(tl.sqrt_rn(largest), tl.sqrt_rn(correction2)) + eps
    param -= tl.div_rn(lr, correction1) * tl.div_rn(first, denominator)
    return param, first, second, peak


@triton.jit
def lion_rule(param, grad, average, second, third, numbers, count, STATES: tl.constexpr):
    lr, kept = tl.load(numbers + 1), tl.load(numbers + 2)
    mixed = tl.load(numbers + 3) * average + tl.load(numbers + 4) * grad
    sign = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, mixed))  # zero stays zero, and NaN shows
    param = kept * param - lr * sign
    average = tl.load(numbers + 5) * average + tl.load(numbers + 6) * grad
    return param, average, second, third


@triton.jit
def sgd_rule(param, grad, buffer, second, third, numbers, count, STATES: tl.constexpr):
    lr, penalty, nesterov = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 5)
    grad += penalty * param
    update = grad
    if STATES == 1:
        old, new = tl.load(numbers + 3), tl.load(numbers + 4)
        buffer = tl.where(old == 0, new * grad, old * buffer + new * grad)  # the first step reads no buffer
        update = tl.where(nesterov == 0, buffer, grad + nesterov * buffer)
    return param - lr * update, buffer, second, third


@triton.jit
def adagrad_rule(param, grad, total, second, third, numbers, count, STATES: tl.constexpr):
    lr, decay, penalty, eps = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    grad += penalty * param
    total += grad * grad
    lr = tl.div_rn(lr, 1.0 + (count - 1.0) * decay)
    return param - lr * tl.div_rn(grad, tl.sqrt_rn(total) + eps), total, second, third


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0, to fp32's rounding: near zero the difference would lose all its digits."""
    series = 1.0 + x / 10.0
    for step in tl.static_range(8):
        series = 1.0 + x / (9.0 - step) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))
