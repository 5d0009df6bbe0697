"""Random choices of one sample: one seed, its streams, and a log of what was chosen."""

import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar('T')


class Draws:
    """The random numbers of one sample.

    Choices (is there motion, how thick are the slices) come from a stream on the CPU and are
    written down by name; voxels of noise come from a stream on the device. The choices are
    therefore the same on every device.

    Parameters
    ----------
    seed : not negative; the same seed gives the same numbers
    device : where noise is drawn
    """

    def __init__(
        self, seed: int, *, device: torch.device | str = 'cpu', scope: tuple[str, ...] = ()
    ) -> None:
        self.seed = seed
        self.device = torch.device(device)
        self.log: dict[str, object] = {}
        self._scope = scope
        # A number for each name, so that scopes do not disturb each other.
        names = [zlib.crc32(name.encode()) for name in scope]
        self._choices = np.random.default_rng([seed, *names])
        noise_seed = int(self._choices.integers(2**63))
        self._noise = torch.Generator(self.device).manual_seed(noise_seed)

    def scope(self, name: str, /) -> 'Draws':
        """Streams of their own for one part of the sample, logged below `name`.

        What is drawn in one scope changes nothing in another.
        """
        inner = Draws(self.seed, device=self.device, scope=(*self._scope, name))
        self.log[name] = inner.log
        return inner

    def uniform(self, name: str, low: float, high: float) -> float:
        """A number between two bounds."""
        return self._note(name, low + (high - low) * self._choices.random())

    def normal(self, name: str, sd: float) -> float:
        """A normal number with mean 0."""
        return self._note(name, sd * self._choices.standard_normal())

    def chance(self, name: str, probability: float) -> bool:
        """True with the given probability; only a yes is written down."""
        yes = bool(self._choices.random() < probability)
        if yes:
            self.log[name] = True
        return yes

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        value = int(self._choices.integers(low, high + 1))
        self.log[name] = value
        return value

    def choice(self, name: str, options: Sequence[T], shares: Sequence[float] | None = None) -> T:
        """One of the options, with the given shares (they need not sum to 1)."""
        total = None if shares is None else np.asarray(shares, float) / np.sum(shares)
        value = options[int(self._choices.choice(len(options), p=total))]
        self.log[name] = value if isinstance(value, (str, int, float)) else str(value)
        return value

    def vector(self, name: str, low: float, high: float, n: int) -> np.ndarray:
        """Independent numbers between two bounds, (n,)."""
        value = low + (high - low) * self._choices.random(n)
        self.log[name] = [round(float(v), 4) for v in value]
        return value

    def shares(self, name: str, n: int) -> np.ndarray:
        """Positive numbers that sum to 1, (n,), all combinations being equally likely."""
        value = self._choices.dirichlet(np.ones(n))
        self.log[name] = [round(float(v), 4) for v in value]
        return value

    def table(self, *shape: int, normal: bool = False) -> np.ndarray:
        """Many numbers (*shape) from 0 to 1, or normal ones, that are not written down."""
        stream = self._choices
        return stream.standard_normal(shape) if normal else stream.random(shape)

    def noise(self, *shape: int) -> Tensor:
        """Normal noise (*shape) float32 on the device."""
        # Filling is three times as fast as `torch.randn` with a generator.
        return torch.empty(shape, device=self.device).normal_(generator=self._noise)

    def _note(self, name: str, value: float) -> float:
        self.log[name] = round(float(value), 4)
        return float(value)
