"""The network, its weights and its inference: arrays in, arrays out."""

from babyseg_bids.network.device import choose_device
from babyseg_bids.network.inference import Segmentation, segment
from babyseg_bids.network.unet import official_network
from babyseg_bids.network.weights import Model, load_model

__all__ = ['Model', 'Segmentation', 'choose_device', 'load_model', 'official_network', 'segment']
