"""PMM and the networks it is compared with. `network.py` and `mixing.py` contain the whole method."""

from pmm_edge.model.checkpoint import Checkpoint as Checkpoint
from pmm_edge.model.checkpoint import build_model as build_model
from pmm_edge.model.checkpoint import load_checkpoint as load_checkpoint
from pmm_edge.model.checkpoint import load_released_checkpoint as load_released_checkpoint
from pmm_edge.model.checkpoint import save_checkpoint as save_checkpoint
from pmm_edge.model.network import PMM as PMM
from pmm_edge.model.network import ReidNetwork as ReidNetwork
from pmm_edge.model.network import StageOutput as StageOutput
