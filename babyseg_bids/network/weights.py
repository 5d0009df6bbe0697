"""Models on disk: safetensors weights that describe themselves, and the official checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from babyseg_bids.errors import ModelError
from babyseg_bids.labels import OFFICIAL, LabelTable, is_official, label_table, table_of
from babyseg_bids.network.official import SPACING, read_official
from babyseg_bids.network.unet import GroupUNet, NetworkConfig

_FORMAT = 'babyseg-4'
# What a file says of its model beside architecture and labels.
_DESCRIBED = ('name', 'version', 'spacing', 'temperature', 'training')


@dataclass(frozen=True)
class Model:
    """A network with what is needed to apply it.

    Parameters
    ----------
    name, version : as recorded in the weights file
    network : (B, G, *size) in 0..1 to logits (B, C, *size)
    labels : the table of its output channels
    spacing : voxel size of the scans that it is given and of its posteriors, mm
    multiple : sizes of those are multiples of this
    training : how it was trained
    temperature : that logits are divided by before the softmax, so that posteriors are calibrated
    official : whether it is the official network, whose scans are prepared in its own way
    """

    name: str
    version: str
    network: nn.Module
    labels: LabelTable
    spacing: float
    multiple: int
    training: dict[str, Any]
    temperature: float = 1.0
    official: bool = False


def shipped_models() -> dict[str, Path]:
    """Names and files of the models inside the package."""
    folder = files('babyseg_bids').joinpath('data/models')
    return {
        Path(str(f)).stem: Path(str(f))
        for f in sorted(folder.iterdir(), key=str)
        if f.name.endswith('.safetensors')
    }


def new_model(network: GroupUNet, **about: Any) -> Model:
    """A model of ours; `about` are further parameters of `Model`."""
    return Model(network=network, labels=label_table(), multiple=network.config.multiple, **about)


def save_model(path: Path, model: Model, /) -> None:
    """Write a model's weights as half-precision safetensors with its description."""
    description = {name: getattr(model, name) for name in _DESCRIBED}
    description['labels'] = model.labels.indices.tolist()
    write_network(path, model.network, _FORMAT, description)  # type: ignore[arg-type]


def write_network(
    path: Path, network: GroupUNet, kind: str, description: Mapping[str, Any], /
) -> None:
    """Write weights in half precision, with their architecture and a description."""
    about = {'format': kind, **description, 'config': network.config.to_dict()}
    tensors = {k: v.detach().half().contiguous() for k, v in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={'babyseg': json.dumps(about)})
    # The library makes files that only their owner may read, which is no use in a container.
    path.chmod(0o644)


def load_model(name: str | Path = 'default', /) -> Model:
    """Load a shipped model by name or any model by its file.

    Raises
    ------
    ModelError
        If there is no such model, or the file is damaged or of another kind.
    """
    models = shipped_models()
    path = models.get(str(name), Path(name))
    if not path.is_file():
        raise ModelError(
            f'There is no model {str(name)!r}: give the path of a .safetensors file, of the '
            'official checkpoint (.pt), or one of the shipped models '
            f'({", ".join(models) or "none in this installation"}).'
        )
    if is_official(path):
        return _official(path)
    network, description = read_network(path, _FORMAT)
    if description['labels'] != label_table().indices.tolist():
        raise ModelError(f'{path} was trained for another label table; use the matching version.')
    return new_model(network, **{name: description[name] for name in _DESCRIBED})


def read_network(path: Path, kind: str, /) -> tuple[GroupUNet, dict[str, Any]]:
    """A network to apply, of a file of that format, and its description.

    Raises
    ------
    ModelError
        If the file is damaged or of another kind.
    """
    try:
        with safe_open(path, framework='pt') as f:
            description = json.loads((f.metadata() or {}).get('babyseg', '{}'))
            tensors = {k: f.get_tensor(k).float() for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise ModelError(
            f'{path} cannot be read as model weights ({e}); copy or download it again.'
        ) from e
    if description.get('format') != kind:
        raise ModelError(
            f'{path} is not a babyseg model of this version; give a .safetensors file that '
            '`babyseg-train export` wrote, or the official checkpoint (.pt).'
        )
    network = GroupUNet(NetworkConfig(**description['config']))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as e:
        raise ModelError(f'The weights in {path} do not fit its own description: {e}') from e
    return network.eval().requires_grad_(False), description


def _official(path: Path) -> Model:
    network, count, multiple = read_official(path)
    if count != len(OFFICIAL):
        raise ModelError(
            f'{path} has {count} labels; the official network has {len(OFFICIAL)}, and the names '
            'of others are unknown.'
        )
    return Model(
        name='official',
        version=path.name,
        network=network,
        labels=table_of(OFFICIAL),
        spacing=SPACING,
        multiple=multiple,
        training={},
        official=True,
    )
