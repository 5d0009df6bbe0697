"""The optimiser of the training: orthogonalised momentum for kernels, Adam for the rest."""

from collections.abc import Iterable

import torch
from torch import Tensor

# Coefficients of the quintic iteration that pushes all singular values towards one (K. Jordan et
# al., Muon, 2024); five steps are enough for momentum matrices.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# The update of a kernel then has the root mean square that Adam's usually has (J. Liu et al.,
# arXiv:2502.16982), so that one learning rate and one decay do for both.
_RMS = 0.2


def orthogonalise(matrix: Tensor, /) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: singular values near one.

    Parameters
    ----------
    matrix : (N, M)
    """
    a, b, c = _QUINTIC
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon for kernels of convolutions, AdamW for vectors and for layers with a single input.

    A kernel (outputs, inputs, *width) is a matrix with a row for each output.

    Parameters
    ----------
    rate : learning rate; groups may have others
    momentum : of kernels (Nesterov's)
    betas : of Adam
    weight_decay : decoupled from the gradient, on kernels only
    bfloat16 : orthogonalise in bfloat16, three times faster for the largest kernels on such a CPU
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        rate: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
        bfloat16: bool = False,
    ) -> None:
        defaults = {
            'lr': rate,
            'momentum': momentum,
            'betas': betas,
            'weight_decay': weight_decay,
        }
        super().__init__(parameters, defaults)
        self.precision = torch.bfloat16 if bfloat16 else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                if p.ndim > 1 and min(p.shape[0], p[0].numel()) > 1:
                    self._kernel(p, group)
                else:
                    self._vector(p, group)

    def _kernel(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state['momentum'] = torch.zeros_like(p)
        state['momentum'].lerp_(p.grad, 1 - group['momentum'])
        ahead = p.grad.lerp(state['momentum'], group['momentum'])
        update = orthogonalise(ahead.flatten(1).to(self.precision)).reshape(p.shape)
        rms = _RMS * max(p.shape[0], p[0].numel()) ** 0.5
        p.mul_(1 - group['lr'] * group['weight_decay'])
        p.add_(update, alpha=-group['lr'] * rms)

    def _vector(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        first, second = group['betas']
        state['step'] += 1
        state['mean'].lerp_(p.grad, 1 - first)
        state['square'].lerp_(p.grad.square(), 1 - second)
        size = state['square'].div(1 - second ** state['step']).sqrt_().add_(1e-8)
        p.addcdiv_(state['mean'], size, value=-group['lr'] / (1 - first ** state['step']))
