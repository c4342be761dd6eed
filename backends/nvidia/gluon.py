"""The Gluon backend of NVIDIA GPUs: Hopper's."""

from portable_mla.backends.nvidia.sm90 import Sm90Backend
from portable_mla.backends.nvidia.tiles import GLUON_ARCH
from portable_mla.backends.nvidia.triton import BACKEND as PORTABLE

BACKEND = Sm90Backend(PORTABLE, GLUON_ARCH)
