"""What passes over an ONNX graph look for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


def producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that makes `value`, if it is of this kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def only_user(value: ir.Value, kind: str) -> ir.Node | None:
    """The one node that reads `value`, if it is of this kind and nobody outside asks for the value."""
    users = [use.node for use in value.uses()]
    alone = len(users) == 1 and not value.is_graph_output()
    return users[0] if alone and users[0].op_type == kind else None


def array(value: ir.Value | None) -> np.ndarray | None:
    """Of a constant; None for anything else."""
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if constant is None else constant.numpy()


def number(value: ir.Value | None) -> Any:
    """Of a constant with one element; None for anything else."""
    constant = array(value)
    return constant.item() if constant is not None and constant.size == 1 else None


def number_list(value: ir.Value | None) -> list[Any] | None:
    """Of a constant with one axis; None for anything else."""
    constant = array(value)
    return constant.tolist() if constant is not None and constant.ndim == 1 else None


def remove_unused(model: ir.Model) -> None:
    """Nodes and weights that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
