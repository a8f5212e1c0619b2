"""`tinyldm.testing` on functions of torch, whose gradients torch's autograd makes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from tinyldm.testing import GradientError, check_gradients, check_jacobian, check_taylor
from tinyldm.testing.strategies import attentions, convolutions, group_norms, tensors_of


def gradients_by_torch(f):
    """The gradient of a plain function of tensors, as `check_gradients` wants it."""

    def vjp(inputs, dy):
        moved = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(f(*moved), moved, dy)

    return vjp


def as_tensors(arrays):
    return [torch.tensor(x) for x in arrays]


@given(drawn=convolutions("n i h w", "o i kh kw", "o"))
def test_convolutions(drawn):
    def f(x, w, b):
        return F.conv2d(x, w, b, **drawn.options)

    check_gradients(f, as_tensors(drawn.inputs), vjp=gradients_by_torch(f))


@given(drawn=group_norms("n c h w", "c", "c"))
def test_group_norms(drawn):
    def f(x, w, b):
        return F.group_norm(x, drawn.options["groups"], w, b)

    check_gradients(f, as_tensors(drawn.inputs), vjp=gradients_by_torch(f))


@given(drawn=attentions("n l d", "n m d", "n m d"))
def test_attention(drawn):
    q, k, v = as_tensors(drawn.inputs)
    d = q.shape[2] // drawn.options["heads"]

    def f(q, k, v):
        q, k, v = (x.unflatten(2, (-1, d)).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=drawn.options["causal"])
        return y.transpose(1, 2).flatten(2)

    check_gradients(f, [q, k, v], vjp=gradients_by_torch(f))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "f", [torch.tanh, F.silu, F.gelu, F.relu, torch.abs, F.softplus, torch.erf, F.softmax]
)
def test_functions_of_one_tensor(f, dtype):
    def call(x):
        return f(x, dim=-1) if f is F.softmax else f(x)

    (x,) = tensors_of("n d", n=3, d=5)
    x = torch.tensor(x, dtype=dtype)
    vjp = gradients_by_torch(call)
    check_gradients(call, [x], vjp=vjp)
    if dtype == torch.float64 and f not in (F.relu, torch.abs):
        assert check_jacobian(call, [x], vjp=vjp) <= 1e-8
        assert check_taylor(call, [x], vjp=vjp) >= 1.9


@pytest.mark.parametrize(
    "wrong, cause",
    [
        (lambda dw: dw / 3, "multiplied by 1/3"),
        (lambda dw: dw.flip(2), "flipped along axis 2"),
        (lambda dw: dw.transpose(0, 1), "transposed"),
    ],
)
def test_a_wrong_gradient_of_a_convolution(wrong, cause):
    def f(x, w):
        return F.conv2d(x, w, padding=1)

    def vjp(inputs, dy):
        dx, dw = gradients_by_torch(f)(inputs, dy)
        return dx, wrong(dw)

    inputs = as_tensors(tensors_of("3 3 5 4", "3 3 3 3"))
    with pytest.raises(GradientError) as error:
        check_gradients(f, inputs, vjp=vjp)
    assert str(error.value).startswith("w: wrong gradient")
    assert cause in " ".join(str(error.value).split())


def test_a_function_of_autograd_with_a_backward_pass_of_ones_own():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            context.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(context, dy):
            return context.saved_tensors[0] * dy  # the 2 is forgotten

    with pytest.raises(GradientError, match="multiplied by ½"):
        check_gradients(
            Square.apply, as_tensors(tensors_of("n", n=4)), vjp=gradients_by_torch(Square.apply)
        )
