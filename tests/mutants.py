"""Breaks the package in one place at a time and reports which mutants the tests kill.

python tests/mutants.py [word of a name ...]     exit status 1 if a mutant survives
"""

# ruff: noqa: E501

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE = ROOT / "lora_kernels"
PROCESSES = 2
OPS, DISPATCH, VMAP, FUNCTIONAL, DROPOUT, BLOCKED, REFERENCE = (
    "_ops.py",
    "_dispatch.py",
    "rules/vmap.py",
    "functional.py",
    "backends/dropout.py",
    "backends/blocked.py",
    "backends/reference.py",
)
MASKS, TRITON = "backends/masks.py", "backends/triton/"
CPU, NATIVE = "csrc/cpu/", "backends/native/__init__.py"
SCALING, PLAN = "backends/scaling.py", "backends/cuda/plan.py"
TABLES, CHOICE = "backends/cuda/tables.py", "backends/cuda/choice.py"
PLANS, KERNEL_OPS = "interpreted_plans", "interpreted_ops"
MANY_ROWS = "test_sums_over_as_many_rows_as_a_batch_has"
MANY_BLOCKS = "test_sums_over_many_blocks"
LARGE = "test_large_values_in_fp16"
GROUPED = "grouped/composite.py"
EXPERTS = "nn/experts.py"
INTEGRATION, TRANSFORMERS = "integrations/peft.py", "integrations/transformers.py"
RECIPES, COMMANDS = "recipes/", "commands/"
KERNELS = "interpreted_plans interpreted_ops interpreted_passes"

# name: (file, function or class that the text stands in, the text, what replaces it, tests that
# should notice). None stands for what is in no function or class; files of csrc/ leave the function
# out, the text occurs once in them. A test is test_NAME.py in a folder of tests, or NAME::test.
MUTANTS = {
    "dora: the norm is not the sum's": ("norms.py", "weight_norms", "of_branch = 2 * cross", "of_branch = cross", "dora_op"),
    "dora: the norm without the branch's square": ("norms.py", "weight_norms", "scaling * (b @ (a @ a.t()))", "0 * scaling", "dora_op"),
    "dora: a norm below zero": ("norms.py", "weight_norms", ".clamp_min(torch.finfo(dtype).tiny)", "", "dora_op"),
    "dora: norms of another weight": ("norms.py", "norms_in_evaluation", "t._version, ", "", "dora_layer"),
    "dora: norms of another place": ("norms.py", "norms_in_evaluation", "[weight, lora_a, lora_b]", "[lora_a, lora_b]", "dora_layer"),
    "dora: norms of another scaling": ("norms.py", "norms_in_evaluation", "key = scaling, *", "key = 0, *", "dora_layer"),
    "dora: norms outlive a mode": ("nn/dora.py", "_DoRA.train", "self.__dict__.pop(HELD, None)", "pass", "dora_layer"),
    "dora: the base term is not dropped": (FUNCTIONAL, "scaled_linear", "F.linear(x - kept, weight, bias)", "F.linear(0 * x, weight, bias)", "dora_op"),
    "dora: the bias is scaled": (FUNCTIONAL, "scaled_linear", "z = lora_linear(x, weight, *pair, scaling=scaling, dropout_p=p, seed=seed)\n        return columns.scale_columns(z, factor, bias)", "z = lora_linear(x, weight, *pair, bias, scaling=scaling, dropout_p=p, seed=seed)\n        return columns.scale_columns(z, factor)", "dora_op"),
    "dora: dz is not scaled": ("backends/columns.py", "_backward", "torch.mul(wide, factor, out=out[block])", "out[block] = wide", "dora_op"),
    "dora: dmagnitude of the last block": ("backends/columns.py", "_backward", "dfactor += ", "dfactor = ", "dora_op"),
    "dora: z kept for a constant factor": ("columns.py", "_Scaled.forward", "z if need_factor else None", "z", "dora_op"),
    "dora: dropout's gradient unmasked": ("columns.py", "_Dropped.backward", "dropped(dy, ctx.p, seed)", "dy", "dora_op"),
    "dora: merged without the factor": ("nn/dora.py", "_DoRA._total", "total *= ", "total * ", "dora_layer"),
    "dora: a final merge leaves the lengths": ("nn/dora.py", "_DoRA._absorb", "if self._active:", "if False:", "dora_layer"),
    "dora: a random start keeps the base's lengths": ("nn/layer.py", "LoRALayer._prepare", "layer._settle_start()", "pass", "dora_layer"),
    "dora: not written to the config": ("checkpoint.py", "_config", '"use_dora": bool(dora)', '"use_dora": False', "dora_layer"),
    "dora: lengths not read": ("checkpoint.py", "_load", "if name in magnitudes:", "if False:", "dora_layer"),
    "dora: PEFT's several at once": (INTEGRATION, "_Fused._variant_objection", "if len(adapters) > 1:", "if False:", "peft_dora"),
    "dora: PEFT's in training with held norms": (INTEGRATION, "_Fused._with_magnitude", "if self.training:", "if False:", "peft_dora"),
    "dora: kernel without what is added": (TRITON + "columns.py", "scale_kernel", "total += tl.load(other", "total = tl.load(other", "interpreted_columns"),
    "dora: kernel sums one tile": (TRITON + "columns.py", "scale_backward_kernel", "total += tl.sum", "total = tl.sum", "interpreted_columns"),
    "dora: kernel's rows past the last": (TRITON + "columns.py", "scale_backward_kernel", "(part * TILES + i) * ROWS", "(part + i) * ROWS", "interpreted_columns"),
    "dora: bias times the factor": (TRITON + "scaled.py", "scale_strips", "acc += added.to(tl.float32)[None, :]", "acc += added.to(tl.float32)[None, :] * 1.5", "interpreted_scaled"),
    "dora: z of y where it is lost": (TRITON + "scaled.py", "factor_kernel", "inside & (4 * signal <= whole + floor)", "inside & (scale == 0)", "interpreted_scaled"),
    "dora: z of y under the dtype's range": (TRITON + "scaled.py", "factor_kernel", "<= whole + floor", "<= whole", "interpreted_scaled"),
    "dora: z anew of one tile of rows": (TRITON + "scaled.py", "factor_kernel", "anew += tl.sum", "anew = tl.sum", "interpreted_scaled"),
    "dora: sums of one program": (TRITON + "scaled.py", "factor_kernel", "place += 3 * N", "place += 2 * N", "interpreted_scaled"),
    "dora: dfactor of a y changed in place": ("scaled.py", "_Linear.backward", "y if ctx.witness._version == ctx.version else None", "y", "interpreted_scaled"),
    "dora: y kept for a constant factor": ("scaled.py", "_Linear.forward", "y.data if need_factor else None", "y.data", "interpreted_scaled"),
    "dora: dropped rows unscaled": (CPU + "low_rank.cpp", "write_any(row.data, C, static_cast<float>(scale)", "write_any(row.data, C, 1.0f", "native"),
    "blocks: another branch's part of s": ("backends/packed.py", "_Together.parts", "matrix.split(self.ranks, dim)", "matrix.split(self.ranks[::-1], dim)", "packed"),
    "blocks: the first scaling for all": ("backends/packed.py", "_Together.shrink", "part.mul_(low)", "part.mul_(lows[0])", "packed"),
    "blocks: the first scaling for all in blocks": ("backends/packed.py", "_Together._shrink_in_blocks", "scaled_product(x[block], a, low)", "scaled_product(x[block], a, lows[0])", "packed"),
    "blocks: the first power of two for all": ("backends/triton/packed.py", "packed_kernel", "high * add_low_rank", "1.0 * add_low_rank", "interpreted_packed"),
    "blocks: the first rows' mask of x for all": ("backends/packed.py", "_Together._shrink_in_blocks", "native.dropped(branch).after(block.start)", "native.dropped(branch)", "packed"),
    "blocks: the first rows' mask of dx for all": ("backends/packed.py", "_Together.expand", "native.dropped(branch).after(block.start)", "native.dropped(branch)", "packed"),
    "blocks: the first rows' mask of dA for all": ("backends/packed.py", "_Together.outer", "native.dropped(branch).after(block.start)", "native.dropped(branch)", "packed"),
    "blocks: dA of the last block alone": ("backends/packed.py", "_Together.outer", "native.outer(x[block], part[block], share, drop)\n                total += share", "native.outer(x[block], part[block], total, drop)", "packed"),
    "blocks: dx of the last branch alone": ("backends/packed.py", "_Together.expand", "native.expand(part[block], branch.lora_a, dx[block], drop=drop, accumulate=i > 0", "native.expand(part[block], branch.lora_a, dx[block], drop=drop, accumulate=False", "packed"),
    "blocks: dx rounded layer by layer": (BLOCKED, "backward_all", "whole = out.dtype == precise", "whole = True", "packed"),
    "blocks: dx without masks": (BLOCKED, "_accumulate", "if term.keep is None:", "if True:", "packed"),
    "blocks: dx of the last layer alone": ("backends/packed.py", "_each", "part if dx is None else dx.add_(part)", "part", "packed"),
    "blocks: dx lacks a frozen layer": ("backends/packed.py", "_each", "part = _through_frozen(dy, base, dx)", "pass", "packed"),
    "blocks: gradients of other layers": ("packed.py", "wanted_of", "Wanted(next(rest), next(rest))", "Wanted(*reversed((next(rest), next(rest))))", "packed mlp"),
    "blocks: a base that trains is taken": ("packed.py", "fits", "or t.requires_grad ", "", "fuse_blocks"),
    "blocks: autocast casts again": ("packed.py", "without_autocast", "enabled=False", "enabled=True", "packed"),
    "blocks: double backward is silent": ("packed.py", "refuse_double_backward", "torch.is_grad_enabled()", "False", "packed"),
    "blocks: dh written over before it is read": ("backends/gating.py", "_gradients", "dh[block].to(wide)", "du[block].to(wide)", "mlp"),
    "blocks: gate and up exchanged": ("mlp.py", "_halves", "return g, u", "return u, g", "mlp"),
    "blocks: the product is kept": ("mlp.py", "_Mlp.forward", "x if reads_x else None, *outputs", "h, *outputs", "mlp"),
    "blocks: a clamp is not seen": ("blocks.py", "_activation", "torch.cat([-far, torch.linspace(-10, 10, 257, dtype=torch.float64), far])", "torch.linspace(-6, 6, 257, dtype=torch.float64)", "fuse_blocks"),
    "blocks: more than the product is taken": ("blocks.py", "_sides", "if foreign:", "if False:", "fuse_blocks"),
    "blocks: gate of another tensor": ("blocks.py", "_sides", "node.args != (x,)", "False", "fuse_blocks"),
    "blocks: hooks of layers passed over": ("blocks.py", "_projection", "if not _is_plain(layer):", "if False:", "fuse_blocks"),
    "blocks: hooks of activations passed over": ("blocks.py", "_FusedMlp._as_one", "any(not _is_plain(layers[name]) for name in block.others)", "False", "fuse_blocks"),
    "blocks: global hooks passed over": ("blocks.py", "_FusedMlp._as_one", " or _has_any_global_hook()", "", "fuse_blocks"),
    "blocks: outputs of a changed tensor": ("packs.py", "Pack.__call__", "of is x and x._version == version", "of is x", "fuse_blocks"),
    "blocks: outputs of another tensor": ("packs.py", "Pack.__call__", "of is x and x._version == version and ", "", "fuse_blocks"),
    "blocks: packed within a checkpoint": ("packs.py", "Pack._may_change", "return self._versions is None or self._versions != self._counted()", "return True", "fuse_blocks"),
    "blocks: packs never give up": ("packs.py", "Pack.__call__", "self._misses += 1", "pass", "fuse_blocks"),
    "blocks: several adapters taken as one": ("nn/layer.py", "LoRALayer.projection", "self._active != (self._first,) or ", "", "fuse_blocks"),
    "blocks: dropout in evaluation": ("nn/layer.py", "LoRALayer.projection", "self.dropout if self.training else 0.0", "self.dropout", "fuse_blocks"),
    "blocks: PEFT's disabled adapters act": (INTEGRATION, "_Fused.projection", "or self._disable_adapters\n            or self.merged", "or self.merged", "fuse_blocks"),
    "blocks: silu's slope": (CPU + "gating.inl", "s * (1.f + x * (1.f - s))", "s * (1.f + x * s)", "mlp"),
    "blocks: gelu's slope": (CPU + "gating.inl", "(1.f - t * t) * rise", "(1.f - t) * rise", "mlp"),
    "blocks: the end of a row": (CPU + "gating.inl", "p.columns - first < kPiece ? p.columns - first : kPiece", "kPiece", "mlp"),
    "blocks: triton's tanh": (TRITON + "gating.py", "tanh", "tl.where(x < 0, -t, t)", "t", "interpreted_gating"),
    "blocks: triton's strides of u": (TRITON + "gating.py", "gate_backward_kernel", "Matrix(u, stride_ur, stride_uc, rows, cols)", "Matrix(u, stride_gr, stride_gc, rows, cols)", "interpreted_gating"),
    "cpu: sums of few ranks without memory": (CPU + "linear.cpp", "keeps_sums ? sum_a.data : nullptr", "sum_a.data", "few_rows"),
    "direct: a wider weight taken": ("direct.py", "linear", "if x.dtype != weight.dtype:", "if False:", "functional few_rows"),
    "sign of ds": (REFERENCE, "_whole_backward", "if turned else b, branch.scaling)", "if turned else b, -branch.scaling)", "ops"),
    "scaling dropped in s": (REFERENCE, "forward", "x).t(), low)", "x).t(), 1)", "ops"),
    "scaling dropped in s of lora_add": (REFERENCE, "add_branch", "x).t(), low)", "x).t(), 1)", "ops"),
    "scaling dropped in ds": (REFERENCE, "_whole_backward", "if turned else b, branch.scaling)", "if turned else b, 1.0)", "ops"),
    "scaling dropped in blocked ds": (BLOCKED, "_Sums.add", "_scaled(rows, self._b, branch.scaling)", "_scaled(rows, self._b, 1.0)", "ops"),
    "1/(1-p) missing in s": (BLOCKED, "_shrink", "scaling * keep_scale(branch.dropout_p)", "scaling", "dropout"),
    "1/(1-p) missing in backward": (BLOCKED, "_Sums.add", "scale = keep_scale(p) if p else 1.0", "scale = 1.0", "dropout"),
    "1/(1-p) missing in dA": (BLOCKED, "_Sums.add", "else keep.drop(x), scale)", "else keep.drop(x), 1.0)", "ops"),
    "mask not applied in dx": (BLOCKED, "_multiply", "keep.add_kept(total, precise_product(low, lora[:, columns]), scale, columns)", "total.add_(precise_product(low, lora[:, columns]), alpha=scale)", "dropout"),
    "mask not applied in dA": (BLOCKED, "_Sums.add", "x if keep is None else keep.drop(x)", "x", "ops"),
    "swapped dA and dB": (REFERENCE, "_whole_backward", "    return dx, dweight, d_a, d_b\n", "    return dx, dweight, d_b, d_a\n", "ops"),
    "swapped A and B in backward": (OPS, "_formula.gradients", "a, b, s, seed = ctx.saved_tensors", "b, a, s, seed = ctx.saved_tensors", "ops"),
    "wrong dtype of dA": (REFERENCE, "_whole_backward", "_as(torch.mm(ds.t(), x), branch.lora_a)", "torch.mm(ds.t(), x)", "ops accuracy"),
    "wrong dtype of blocked dA": (BLOCKED, "_Sums.gradients", "d_a.to(self._branch.lora_a.dtype)", "d_a.to(self._dtype)", "ops accuracy"),
    "s rounded twice": (REFERENCE, "scaled_product", "return torch.addmm(unread, rows, matrix, beta=0, alpha=scaling)", "return (rows @ matrix).mul_(scaling)", "accuracy"),
    "s rounded twice in blocks": (BLOCKED, "_scaled", "return torch.addmm(rows.new_zeros(()), rows, matrix, beta=0, alpha=scale)", "return (rows @ matrix) * scale", "accuracy"),
    "bias rounded on its own": (BLOCKED, "_multiply", "torch.addmm(some, rows, strip, out=total)", "total.copy_(torch.mm(rows, strip) + some)", "accuracy"),
    "branch rounded on its own": (REFERENCE, "forward", "y.addmm_(s, _as(branch.lora_b, x).t(), alpha=high)", "y += high * (s @ _as(branch.lora_b, x).t())", "accuracy"),
    "bias dropped in wide path": (BLOCKED, "_multiply", "if bias is None:", "if True:", "accuracy"),
    "dA summed in 16 bits": (BLOCKED, "_sum_dtype", "return torch.float64 if dtype == torch.float64 else torch.float32", "return dtype", "accuracy"),
    "a wrong mask kernel is trusted": ("backends/trial.py", "_try", "return fault is None", "return True", "masks"),
    "a mask kernel that cannot be compiled raises": ("backends/trial.py", "_try", "except Exception as error:", "except KeyError as error:", "masks"),
    "a mask kernel is tried in a capture": ("backends/trial.py", "passes", "if torch.cuda.is_current_stream_capturing():", "if False:", "masks"),
    "a mask kernel is tried every time": ("backends/trial.py", "passes", "if device not in known:", "if True:", "masks"),
    "columns of the mask from the first on": (MASKS, "Mask.add_kept", "self._keep[:, columns]", "self._keep[:, : term.shape[1]]", "masks"),
    "elementwise mask of row 0": (TRITON + "masking.py", "mask_kernel", "first_row + row, col, threshold", "row, col, threshold", f"{KERNEL_OPS}::test_the_elementwise_mask"),
    "elementwise mask's scale dropped": (TRITON + "masking.py", "mask_kernel", "+ kept * scale", "+ kept", f"{KERNEL_OPS}::test_the_elementwise_mask"),
    "a table of another Triton holds": (TABLES, "_checked", "if proven != here:", "if False:", "triton_backend::test_a_table_of_another_triton_holds_for_nothing"),
    "philox rounds 6": (DROPOUT, None, "ROUNDS = 7", "ROUNDS = 6", "dropout"),
    "philox key halves swapped": (DROPOUT, "philox", "k0, k1 = seed & _LOW, (seed >> 32) & _LOW", "k1, k0 = seed & _LOW, (seed >> 32) & _LOW", "dropout"),
    "threshold off by one": (DROPOUT, "keep_mask", ">= threshold(p) - 32768", "> threshold(p) - 32768", "dropout"),
    "truncated threshold": (DROPOUT, "threshold", "round(65536 * p)", "int(65536 * p)", "dropout"),
    "high half first": (DROPOUT, "keep_mask", "halves = words.to(torch.int32).view(torch.int16)", "halves = words.to(torch.int32).view(torch.int16).unflatten(-1, (-1, 2)).flip(-1)", "dropout"),
    "signed comparison": (DROPOUT, "keep_mask", "(halves ^ -32768)", "halves", "dropout"),
    "block offset dropped forward": (BLOCKED, "_shrink", "_mask(branch, block.start, *rows.shape", "_mask(branch, 0, *rows.shape", "dropout"),
    "block offset dropped backward": (BLOCKED, "_Sums.add", "_mask(branch, block.start, len(rows)", "_mask(branch, 0, len(rows)", "dropout"),
    "blocks overlap the last row": (BLOCKED, "blocks", "range(0, count, step)", "range(0, count - 1, step)", "accuracy"),
    "double-backward formula removed": (OPS, None, "    if _op.is_backward:\n", "    if _op.is_backward and _op.has_weight:\n        continue\n    elif _op.is_backward:\n", "ops"),
    "double-backward formula of lora_add removed": (OPS, None, "    if _op.is_backward:\n", "    if _op.is_backward and not _op.has_weight:\n        continue\n    elif _op.is_backward:\n", "ops"),
    "mark_non_differentiable removed": (DISPATCH, "_register_private.Function.forward", "                ctx.mark_non_differentiable(*output[1:])\n", "                pass\n", "ops"),
    "save flag inverted": (REFERENCE, "forward", "s if save_s", "s if not save_s", "ops"),
    "x always saved": (OPS, "_formula.save", " if any(args[i].requires_grad for i in readers) else None", "", "ops"),
    "gradients computed unasked": (REFERENCE, "_whole_backward", "    if need.weight and isinstance(base, Dense):\n        dweight = _as(", "    if isinstance(base, Dense):\n        dweight = _as(", "ops"),
    "lora_add works in place": (REFERENCE, "forward", "base.out.clone(memory_format=torch.contiguous_format)", "base.out", "ops"),
    "tuner: candidate not checked": ("tuning/search.py", "qualify", "work.right.require(str(candidate), first, work.names)", "pass", "tuning"),
    "tuner: memory not poisoned": ("tuning/guards.py", "poisoned", "fill_uninitialized_memory = True", "fill_uninitialized_memory = False", "tuning"),
    "tuner: one run is enough": ("tuning/search.py", "qualify", "for run in range(1, runs):", "for run in range(1, 1):", "tuning"),
    "tuner: a hang is waited for": ("tuning/workers.py", "_watch", "child.kill()", "pass", "tuning"),
    "tuner: the dead plan goes on": ("tuning/table.py", "Table.refuses", "return any(", "return False and any(", "tuning"),
    "tuner: slower than ATen and taken": ("tuning/search.py", "simplest", "ratio < _TAKEN and ", "", "tuning"),
    "tuner: memory beside not looked at": ("tuning/guards.py", "GuardBands.require_whole", "if written:", "if False:", "tuning"),
    "tuner: overlapping launches proven by others": ("tuning/search.py", "qualify", "again and not overlaps(candidate)", "again", "tuning"),
    "tables: the package before the user": (TABLES, "_look", "if cached is not None and _is_there(cached):", "if False:", "tuning"),
    "tables: a bad file of the user ends a call": (TABLES, "_look", "except ValueError as error:", "except KeyError as error:", "tuning"),
    "tables: changed kernels hold": (TABLES, "_checked", "not in changed", "not in ()", "tuning"),
    "tables: kernels are not in the key": (TABLES, "key_of", "*card)", ")", "tuning"),
    "traffic: more blocks than needed": (BLOCKED, "_step", "_ACCELERATOR_BLOCK_BYTES // (4 * K)", "_ACCELERATOR_BLOCK_BYTES // (64 * K)", "traffic"),
    "cards: shared memory ignored": (TRITON + "tiles.py", "fitted", "> target.shared", "> 1 << 40", "codegen"),
    "cards: RTX 50 a Hopper": ("backends/device.py", "Target.has_wide_tiles", "return self.is_hopper or self.is_blackwell", "return self.arch >= 90", "codegen"),
    "cards: T4 gets Triton": ("backends/cuda/needs.py", "triton", "if not current().has_tensor_cores:", "if False:", "codegen"),
    "no rows, no zeros": (BLOCKED, "_Sums.gradients", "d_b = self.a.new_zeros(r, N)", "d_b = self.a.new_ones(r, N)", "ops"),
    "forward mode not refused": (DISPATCH, "refuse_forward_mode", "if getattr(forward_ad, \"_current_level\", 0) < 0:", "if True:", "ops"),
    "flops without the branch": ("rules/flops.py", "_formula.count", "(K * N * op.has_weight + r * (K + N))", "K * N * op.has_weight", "ops"),
    "flops never registered": ("rules/flops.py", "register", "sys.meta_path.insert(0, _Finder())", "pass", "import"),
    "dual tensors not refused": (DISPATCH, "call", "    refuse_forward_mode(args)\n", "", "ops"),
    "jvp not refused": (DISPATCH, "_register_private.dispatch", "        refuse_forward_mode(args)\n        if not (", "        if not (", "transforms"),
    "no graph below a level of grad": (DISPATCH, "_single_level.forward", "with torch.enable_grad(), _set", "with _set", "transforms"),
    "no tangents below a level of grad": (DISPATCH, "_single_level.forward", "_set_fwd_grad_enabled(True):", "_set_fwd_grad_enabled(False):", "transforms"),
    "dropout folded by vmap": (VMAP, "_only_rows", "return args[op.index[\"dropout_p\"]] == 0 and ", "return ", "transforms"),
    "dA folded by vmap": (VMAP, "_only_rows", " and not asked", "", "transforms"),
    "batched adapter folded by vmap": (VMAP, "_only_rows", " and batched.issubset(op.rows)", "", "transforms"),
    "lora_add_ onto one base by vmap": (VMAP, "_one_by_one", "and in_dims[0] is None", "and False", "transforms"),
    "Conv1D read as a Linear": ("nn/conv1d.py", "FusedLoRAConv1D._oriented", "return weight.t()", "return weight", "integrations_transformers"),
    "several: those in use do not add up": ("nn/layer.py", "LoRALayer._acting_forward", "for A, B, scaling, p in others:", "for A, B, scaling, p in ():", "several"),
    "several: unused ones act": ("nn/layer.py", "LoRALayer._directly", "elif self._active != (self._first,):", "elif False:", "several"),
    "several: merged without the others": ("nn/named.py", "Named.acting", "self._active):", "self._active[:1]):", "several"),
    "several: the base taken from others": ("nn/merging.py", "Merging.why_unmergeable", "if reason is None and others and self._active:", "if False:", "several"),
    "several: rows read in a backward": ("nn/named.py", "OfRows.rows_now", "or rows.again or not in_backward():", "or True:", "several"),
    "several: computed again without its rows": ("several.py", "_patch.apply", "reentrant.apply(_bound(function), *args)", "reentrant.apply(function, *args)", "several"),
    "several: computed again without its rows, not reentrant": ("several.py", "_patch.generator", "other(_bound(function), *args", "other(function, *args", "several"),
    "several: checkpointing stays changed": ("several.py", "_acting", "                _unpatch()\n", "                pass\n", "several"),
    "several: some of the rows taken for all": ("nn/named.py", "Rows._rows_per_sample", "elif rest or each not in self._per_sample:", "elif rest:", "several"),
    "several: the deleted taken for none": ("nn/named.py", "Rows.there", "        if gone:\n", "        if False:\n", "several"),
    "several: deleted under a batch": ("several.py", "delete_adapter", 'refuse("delete_adapter", {n: layer.why_undeletable(name) for', 'str({n: layer.why_undeletable(name) for', "several"),
    "several: the first deleted keeps its numbers": ("nn/named.py", "Named.delete", '(*FACTORS, "alpha", "dropout", "use_rslora", "freeze_a"):', "FACTORS:", "several"),
    "several: a further one is used at once": ("adapters.py", "attach_other", "            other.activate(())\n", "", "several"),
    "several: base states demand adapters": ("nn/named.py", "NamedAdapter._load_from_state_dict", "if any(prefix + name in state_dict for name in FACTORS):", "if True:", "several"),
    "several: numbers of groups by the layer": ("nn/named.py", "Rows._make", "[self.table.index(name) for name in names]", "[*range(len(names))]", "several"),
    "several: copies compute a batch's rows": ("nn/layer.py", "LoRALayer.__getstate__", 'if key not in _PASSING', "", "several"),
    "several: PEFT's training with its hooks": (INTEGRATION, "_with_rows", "given is None or not model.training", "True", "mixed_batches"),
    "several: PEFT's base samples by an adapter": (INTEGRATION, "_Fused._of_rows", "rows.groups(x, adapters)", "Groups.from_rows([0] * x.shape[:-1].numel(), len(adapters))", "mixed_batches"),
    "experts: one bound of Kaiming's for all": ("nn/pissa.py", "draw", "A.flatten(0, rank_dim)", "A", "lora_experts"),
    "experts: of transposed weights": (EXPERTS, "LoRAExpertProduct._oriented", "weight.transpose(1, 2) if", "weight if", "lora_experts"),
    "experts: disabled while merged": (EXPERTS, "LoRAExpertProduct.forward", "if self._disabled and self._merged:", "if False:", "lora_experts"),
    "experts: disabled ones act": (EXPERTS, "LoRAExpertProduct.forward", "if self._disabled or self._merged", "if self._merged", "lora_experts"),
    "experts: unused ones act": (EXPERTS, "LoRAExpertProduct.forward", " or not self._active:", ":", "lora_experts"),
    "experts: dropout in evaluation": (EXPERTS, "LoRAExpertProduct.forward", "self.dropout if self.training else 0.0", "self.dropout", "lora_experts"),
    "experts: B with the expert slowest": (EXPERTS, "to_peft", "b.permute(1, 2, 0)", "b.permute(1, 0, 2)", "lora_experts"),
    "experts: older files as they lie": (EXPERTS, "from_peft", "B.view(K, r, E).permute(2, 1, 0)", "B.view(K, E, r).permute(1, 2, 0)", "lora_experts"),
    "experts: the first wrapped outermost": ("checkpoint.py", "_wrapped", '".base_layer" * outside', '".base_layer" * (not outside)', "lora_experts"),
    "experts: a new base not merged again": (EXPERTS, "LoRAExperts._load_from_state_dict", "prefix + adapted.parameter in state_dict", "False", "lora_experts"),
    "experts: their class stays": (EXPERTS, "LoRAExpertProduct.move_out", "        if not any(experts.adapted()):\n", "        if False:\n", "lora_experts"),
    "experts: merged ones left as they are": ("merged.py", "_MergedStateDict.__getitem__", "if isinstance(of_expert, LoRAExpertProduct):", "if False:", "lora_experts"),
    "experts: base of merged ones not saved": (TRANSFORMERS, "_base_state", "of_expert if layer.suffix else names", "names", "lora_experts"),
    "experts: said to be left frozen": ("targets.py", "others", "if kind is not None and parameter not in adapted:", "if kind is not None:", "lora_experts"),
    "experts: their rank is the others'": ("convert.py", "_apply", "if chosen.expert_rank is not None:", "if False:", "lora_experts"),
    "many: tiles of the batch, not of a group": (TRITON + "many.py", "find_tile", "(tile - last + own) * BM", "tile * BM", "interpreted_many"),
    "many: the mask by rows of the batch": (TRITON + "many.py", "many_shrink_kernel", "keep_tile(seed, place - begin, i * BC", "keep_tile(seed, place, i * BC", "interpreted_many"),
    "many: lanes past a rank read": (TRITON + "many.py", "many_expand_kernel", "Matrix(mat, stride_r, stride_c, r, C)", "Matrix(mat, stride_r, stride_c, R, C)", "interpreted_many"),
    "many: rows past a group's read": (TRITON + "many.py", "many_tall_kernel", "inside = (place < end)[:, None]", "inside = (place < end + 1)[:, None]", "interpreted_many"),
    "many: dx not masked": ("backends/cuda/many.py", "backward", "many.many_expand(ds, down, of_rows, True, dx)", "many.many_expand(ds, down, of_rows, False, dx)", "interpreted_many"),
    "many: a power of two dropped": ("backends/cuda/many.py", "_down", "[high for _, high in splits]", "[1.0 for _, high in splits]", "interpreted_many"),
    "many: the weight of another's expert": (TRITON + "experts.py", "experts_kernel", "expert = tl.load(weight_of + group)", "expert = group", "interpreted_many"),
    "many: rows past an expert's stored": (TRITON + "experts.py", "experts_kernel", "inside = (place < end)[:, None]", "inside = (place < end + 1)[:, None]", "interpreted_many"),
    "many: an expert's power of two dropped": (TRITON + "experts.py", "experts_kernel", "total *= factor", "total *= 1.0", "interpreted_many"),
    "many: the bias of the first expert": (TRITON + "experts.py", "experts_kernel", "bias + expert * stride_be", "bias + 0 * stride_be", "interpreted_many"),
    "many: dx of experts not masked": ("backends/cuda/many.py", "backward", "experts.product(dy, bases, ds, down, of_rows, True, dx)", "experts.product(dy, bases, ds, down, of_rows, False, dx)", "interpreted_many"),
    "several: another's file written": ("checkpoint.py", "save_adapter", "adapters.adapters_of(model, chosen)", "adapters.adapters_of(model, adapters.adapter_names(model)[0])", "several"),
    "Conv1D merged transposed": ("nn/merging.py", "Merging._take_up", "self.matrix.copy_", "self.weight.copy_", "integrations_transformers"),
    "fan_in_fan_out not written": ("checkpoint.py", "_config", "not turned.isdisjoint(layers)", "False", "integrations_transformers"),
    "buffers of modules_to_save left out": ("adapters.py", "state_of", "found = {**module._parameters, **module._buffers}", "found = {**module._parameters}", "checkpoint"),
    "merged state without its base": ("nn/state.py", "LayerState._save_to_state_dict", "        if self._base_weight_cpu is not None:  # no", "        if False:  # no", "nn"),
    "a merged state taken for a base": ("nn/state.py", "LayerState._load_from_state_dict", "        if base is not None:\n", "        if False:\n", "nn"),
    "a plain weight not merged again": ("nn/state.py", "LayerState._load_from_state_dict", "        elif again:\n", "        elif False:\n", "nn"),
    "a final merge outlives a new base": ("nn/state.py", "LayerState._load_from_state_dict", '        elif base is not None or "weight" in given:', "        elif base is not None:", "nn"),
    "a state that does not fit half loaded": ("nn/state.py", "LayerState._load_from_state_dict", "            error_msgs += errors\n            return", "            error_msgs += errors", "nn"),
    "an adapter for a base that is gone": ("nn/state.py", "LayerState._misfits", 'if self._merged == "final" and adapter and', "if False and adapter and", "nn"),
    "the caller's tensors merged into": ("nn/state.py", "LayerState._load_from_state_dict", 'state[prefix + "weight"] = given["weight"].clone()', "pass", "nn"),
    "merged_state_dict of untrained values": ("merged.py", "_MergedStateDict.__getitem__", "return whole(saved.trained)", "return whole(saved.base)", "merged"),
    "merged_state_dict without the adapter": ("merged.py", "_MergedStateDict.__getitem__", 'isinstance(module, LoRALayer) and attribute == "weight":', "False:", "merged"),
    "merged twice in merged_state_dict": ("nn/merging.py", "Merging.merged_weight", "        if self._merged:\n            return self.weight.detach()\n", "", "merged"),
    "wrappers in names": ("names.py", "_attribute", "        return \"module\"\n", "        return None\n", "names"),
    "compiled blocks in names": ("names.py", "_attribute", "    for (home, kind), attribute in {**_ELSEWHERE, **_HIDDEN}.items():", "    for (home, kind), attribute in _HIDDEN.items():", "names"),
    "checkpointed blocks in names of states": ("names.py", "keyed_modules.walk", "            if attribute not in _HIDDEN.values():\n", "            if True:\n", "names"),
    "one's own module taken for a wrapper": ("names.py", "_attribute", "    if isinstance(module, _PARALLEL):", '    if "module" in module._modules:', "names"),
    "what trains and is not saved not said": ("checkpoint.py", "save_adapter", "    _warn_of_unsaved(model)\n", "", "names"),
    "frozen parameters said to be left out": ("checkpoint.py", "_warn_of_unsaved", "and parameter.requires_grad", "", "names"),
    "shared experts as PEFT's fused ones": ("peft_targets.py", "taken_for_experts", "    return [name for name in layers if name.rpartition", "    return [name for name in () if name.rpartition", "peft_targets"),
    "patterns of parameters without .weight": ("checkpoint.py", "_config.whole", '(r"(\\.weight)?" if name in as_parameters else "")', '""', "peft_targets"),
    "dropout beside target_parameters": ("checkpoint.py", "_config", "0.0 if as_parameters or experts else layers[first].dropout", "layers[first].dropout", "peft_targets"),
    "PEFT's renaming not said": ("peft_targets.py", "warn_of_differences", "    if reason:\n", "    if False:\n", "peft_targets"),
    "a module in two places not said": ("peft_targets.py", "_shared", "if len(found) > 1]", "if len(found) > 2]", "peft_targets"),
    "inner models without a guard": (TRANSFORMERS, "guard", "    for module in model.modules():\n        save =", "    for module in (model,):\n        save =", "save_pretrained"),
    "a copy saves the original": (TRANSFORMERS, "guard", "functools.partial(_save_pretrained, module)", "lambda *a, **k: _save_pretrained(module, *a, **k)", "save_pretrained"),
    "guards of inner models left behind": (TRANSFORMERS, "release", "    for module in model.modules():\n        saving =", "    for module in (model,):\n        saving =", "save_pretrained"),
    "every save_pretrained guarded": (TRANSFORMERS, "guard", 'if callable(save) and "save_directory" in inspect.signature(save).parameters:', "if callable(save):", "save_pretrained"),
    "the sum saved as the base": (TRANSFORMERS, "_base_state", "        if base is not None and base.numel():\n", "        if False:\n", "save_pretrained"),
    "compiled names in a saved base": (TRANSFORMERS, "_base_state", "state[names.join(plain.get(owner, owner), attribute)] = tensor", "state[key] = tensor", "save_pretrained"),
    "unmerged layers lost beside a final one": (TRANSFORMERS, "_save_pretrained", "        if parts[name]:\n", "        if len(parts[name]) == len(layers):\n", "save_pretrained"),
    "a failed rename not undone": ("files.py", "replace_together", "for path in renamed:", "for path in ():", "checkpoint"),
    "fixed seed": ("direct.py", "draw_seed", "torch.randint(2**63 - 1, (), dtype", "torch.randint(1, (), dtype", "dropout"),
    "autocast inside the op": (OPS, "_compute.run", "if torch.is_autocast_enabled(device):", "if False:", "functional"),
    "lora_add_ in grad mode": (FUNCTIONAL, "lora_add_", "if torch.is_grad_enabled() and any(", "if False and any(", "functional"),
    "bias dropped with few rows": (REFERENCE, "_base", "torch.addmm(bias[:, None], weight, x_t)", "torch.mm(weight, x_t)", "ops accuracy"),
    "op past autograd keeps no graph": (DISPATCH, "call", "y = _functions[name].apply(None, *args)", "y = _below(op, args)[0]", "ops"),
    "raw op unchecked": (DISPATCH, "register_kernel.run", "        check(args)\n", "", "ops_checks"),
    "fake unchecked": (OPS, "_fake.run", "        check(args)\n", "", "ops_checks"),
    "raw op takes rank 0": ("_checks.py", "checker.check", 'if 0 in (sizes["N"], sizes["K"], sizes["r"]):', "if False:", "ops_checks"),
    "unread s refused": ("_checks.py", "checker.check", "not _is_read(key, names, args)", "False", "ops_checks"),
    "sharded masks start at column 0": ("rules/dtensor.py", "_place_seed", "return torch.cat([seed.reshape(1), *offsets])", "return seed", "distributed"),
    "sharded part of a sum counted twice": ("rules/dtensor.py", "_local", "return local if first else torch.zeros_like(local)", "return local", "distributed"),
    "styles: the first dimension of every tensor split": ("distributed.py", "_ParallelLoRA._layouts", "Shard(dimensions.index(cls._letter))", "Shard(0)", "distributed::test_placements_of_the_styles"),
    "pickles name a room of the layer": ("nn/__init__.py", None, "    _kind.__module__ = __name__\n", "    pass\n", "nn"),
    "list of dimensions wrong": ("nn/tensors.py", None, '"lora_B": "Nr"', '"lora_B": "rN"', "nn"),
    "integrations not told of adapters": ("__init__.py", None, "adapters.guards.append(adapters.Guard(_transformers.guard, _transformers.release))\n", "", "save_pretrained"),
    "the reference computes the adapters": ("reference_model.py", "_Reference.__call__", "torch.no_grad(), disable_adapters(self), ", "torch.no_grad(), ", "reference_model"),
    "the reference keeps the model's dropout": ("reference_model.py", "_Reference.__call__", ", _evaluating(self):", ":", "reference_model"),
    "the reference leaves the model in evaluation mode": ("reference_model.py", "_evaluating", "module.training = True", "module.training = False", "reference_model"),
    "the reference freezes the adapters": ("reference_model.py", "_Reference.requires_grad_", "return self", "return super().requires_grad_(requires_grad)", "reference_model"),
    "the reference sets the model's mode": ("reference_model.py", "_Reference.train", "return self", "return super().train(mode)", "reference_model"),
    "integrations not told of their removal": ("convert.py", "remove_lora", "    adapters.unguard(model)\n", "", "save_pretrained"),
    "whole dropped copy": (BLOCKED, "_step", "return max(1, _CPU_BLOCK_BYTES // (4 * max(K, N)))", "return 1 << 40", "ops"),
    "triton: scale dropped in s": (TRITON + "low_rank.py", "shrink_kernel", "store_tile(Matrix(out, 1, r, r, M), acc * scale,", "store_tile(Matrix(out, 1, r, r, M), acc,", KERNELS),
    "triton: scaling dropped in ds": (TRITON + "gradients.py", "ds_db", "(part_ds, ds, scaling)", "(part_ds, ds, 1.0)", KERNELS),
    "triton: a row tile missing in dB": (TRITON + "gradients.py", "ds_db_kernel", "part_db += tile.to(tl.int64) * N * r", "part_db += 0 * tile.to(tl.int64)", KERNELS),
    "triton: mask not applied in dx": (TRITON + "blocks.py", "add_low_rank", "tl.where(keep, total * term.mask.scale, 0.0)", "total * term.mask.scale", KERNELS),
    "triton: mask not applied in dA": (TRITON + "gradients.py", "tall_tile", "tl.where(keep_tile(seed, rows, part.col, mask.threshold, part.BC), tile, 0.0)", "tile", KERNELS),
    "triton: place in the mask ignored": (TRITON + "blocks.py", "keep_tile", "rows = row_0 + rows", "rows = rows + 0 * row_0", KERNELS),
    "triton: last column of the reduction lost": (TRITON + "gemm.py", "pointer_loop", "x_values = tl.load(x_tile, mask=ks[None, :] < left,", "x_values = tl.load(x_tile, mask=ks[None, :] < left - 1,", KERNELS),
    "triton: last partial sum lost": (TRITON + "reduce.py", "sum_partials", "(index[:, None] < job.parts)", "(index[:, None] < job.parts - 1)", KERNELS),
    "triton: bias added after a strip": (TRITON + "gemm.py", "finish_tile", "acc += values.to(out.ptr.dtype.element_ty).to(tl.float32)[None, :]", "acc += values.to(tl.float32)[None, :] * (place.col < place.BN)", KERNELS),
    "triton: s of the flag kernel unscaled": (TRITON + "flag.py", "flag_kernel", "Matrix(s, r, 1, M, r), low * scale,", "Matrix(s, r, 1, M, r), low,", KERNELS),
    "triton: a share of the rows missing in grouped dA": (TRITON + "grouped.py", "dx_da_kernel", "columns * ranks * SPLIT:", "columns * ranks * SPLIT - 1:", KERNELS),
    "triton: 1/(1-p) missing in grouped dA": (TRITON + "grouped.py", "dx_da", "reduce_partials((part, out, scale))", "reduce_partials((part, out, 1.0))", KERNELS),
    "triton: alignment not in the key": (TRITON + "launch.py", "_key", "key.append(arg.data_ptr() % 16)", "pass", "triton_launch"),
    "triton: partial sums freed too early": (TRITON + "low_rank.py", "shrink", "held.append(part)", "pass", "triton_backend"),
    "triton: dy read once more": (TRITON + "tiles.py", "fuses_ds_db", "return r < 64 and r <= rank_block(dtype, r)", "return False", KERNELS),
    "tensor scaling dropped": (FUNCTIONAL, "_fold", "return 1.0, wide * scaling.to(wide.dtype)", "return 1.0, wide", "functional"),
    "tensor scaling folded in 16 bits": (FUNCTIONAL, "_fold", "wide = lora_b if lora_b.dtype == torch.float64 else lora_b.float()", "wide = lora_b", "functional"),
    "scaling that trains detached": (FUNCTIONAL, "_check_scaling", "if scaling.requires_grad and torch.is_grad_enabled():", "if False:", "functional"),
    "scaling on another device": (FUNCTIONAL, "_check_scaling", "if scaling.device != device:", "if False:", "functional"),
    "good case blind to devices": ("_checks.py", "are_sound", "or tensor.device != device:\n            return False", "or False:\n            return False", "functional"),
    "good case blind to autocast": ("_checks.py", "are_sound", "and (x.is_meta or not torch.is_autocast_enabled(device.type))", "", "functional"),
    "fused PEFT: global hooks unseen": (INTEGRATION, "_Fused.forward", "or _has_any_global_hook()", "", "integrations_peft"),
    "fused PEFT: backward hooks unseen": (INTEGRATION, "_module_objection", "or module._backward_hooks", "", "integrations_peft"),
    "fused PEFT: backward pre-hooks unseen": (INTEGRATION, "_module_objection", "or module._backward_pre_hooks", "", "integrations_peft"),
    "fused PEFT: replaced forward unseen": (INTEGRATION, "_module_objection", 'or "forward" in module.__dict__', "", "integrations_peft"),
    "fused PEFT: subclass of a weight taken": (INTEGRATION, "_module_objection", "if types is not None and type(parameter) not in _PLAIN:", "if False:", "integrations_peft"),
    "fused PEFT: merged adapters unseen": (INTEGRATION, "_Fused.forward", "or self.merged_adapters", "", "integrations_peft"),
    "fused PEFT: dropout of a few rows": (INTEGRATION, "_Fused._small_forward", "if dropout.training and type(dropout) is nn.Dropout:", "if False:", "integrations_peft"),
    "fused PEFT: scaling of a few rows": (INTEGRATION, "_Fused._small_forward", "y = y + branch * self.scaling[name]", "y = y + branch", "integrations_peft"),
    "fused PEFT: few rows compiled": (INTEGRATION, "_Fused.forward", "x.is_cpu and not torch.compiler.is_compiling()", "x.is_cpu", "integrations_peft"),
    "fused PEFT: any scaling tensor taken": (INTEGRATION, "_takes", "return not isinstance(scaling, Tensor) or (", "return True or (", "integrations_peft"),
    "fused PEFT: lost gradient unnoticed": (INTEGRATION, "_try_gradient", "if dx is None or not dx.any():", "if False:", "integrations_peft"),
    "fused PEFT: wrong gradient unnoticed": (INTEGRATION, "_try_gradient", "if linear and not (", "if False and not (", "integrations_peft"),
    "fused PEFT: tried on the base itself": (INTEGRATION, "_try_gradient", "    base = copy.deepcopy(base)\n", "", "integrations_peft"),
    "fused PEFT: warns in every call": (INTEGRATION, "_Fused._warn", "self.__dict__.pop(_WARNING)", "self.__dict__[_WARNING]", "integrations_peft"),
    "fused PEFT: warns where nothing is lost": (INTEGRATION, "_Fused._warn", "if isinstance(x, Tensor) and x.requires_grad:", "if True:", "integrations_peft"),
    "fused PEFT: own name in repr": (INTEGRATION, "_Fused._get_name", "return self.peft_class.__name__\n", "return type(self).__name__\n", "integrations_peft"),
    "metadata of a weight taken for a use": ("forwards.py", "_Visitor.visit_Attribute", """if inner[-1:] == ("weight",) and asked:""", "if False:", "bypass"),
    "conditions of a read ignored": ("forwards.py", "_may_run", "if value is not _UNKNOWN and bool(value) != outcome:", "if False:", "bypass"),
    "read past only in forward itself": ("forwards.py", "weights_read", "todo.append((*member, 0))", "pass", "bypass"),
    "encoder layers stay on the fast path": ("bypass.py", "_leave_fast_path", "setattr(module, option, 0)", "pass", "bypass"),
    "nested tensors for encoders with adapters": ("bypass.py", None, """    nn.TransformerEncoder: "use_nested_tensor",\n""", "", "bypass"),
    "fast path not given back": ("bypass.py", "update_fast_paths", "setattr(module, option, vars(module).pop(_KEPT + option))", "pass", "bypass"),
    "layers put in by hand stay on the fast path": ("bypass.py", "_leave_on_assignment", "if isinstance(child, LoRALayer) and isinstance(module", "if False and isinstance(module", "bypass"),
    "bypassed layers named explicitly are skipped": ("targets.py", "find_targets", "elif module in past and wanted:", "elif False:", "bypass"),
    "check: weights not restored": ("check/merging.py", "_merges.restore", "parameter.copy_(value)", "pass", "check"),
    "check: optimizers step in the backward": ("check/runs.py", "unchanged", "now.clear()\n    try:", "pass\n    try:", "check"),
    "check: adapters merged as small as they are": ("check/merging.py", "_merges.enlarge", "_enlarge(adapter)", "pass", "check"),
    "check: a zero gradient passes": ("check/training.py", "_zero", "if norm == 0 and not explained", "if False", "check"),
    "check: B = 0 taken for a fault": ("check/training.py", "_zero", "if norm == 0 and not explained", "if norm == 0", "check"),
    "check: compared in train mode": ("check/runs.py", "run", "if evaluate:", "if False:", "check"),
    "training silent about idle adapters": ("recipes/training.py", "_step", "_warn_of_idle_adapters(model, optimizer)\n    scaler", "pass\n    scaler", "check"),
    "training warns at every step": ("recipes/training.py", "train_model", "first=len(history) == begun", "first=True", "check"),
    "cpu: partial sums past the 16th lost": (CPU + "low_rank.cpp", "for (int64_t i = 0; i < chunks; ++i) {", "for (int64_t i = 0; i < std::min<int64_t>(chunks, 16); ++i) {", f"native::{MANY_ROWS}"),
    "cpu: scale of a gradient dropped": (CPU + "low_rank.cpp", "width, p.gradient_scale, p.gradient.data", "width, 1.f, p.gradient.data", f"native::{LARGE}"),
    "cpu: masks of what is read wrap at row 4096": (CPU + "low_rank.inl", "static_cast<uint32_t>(first + i), strip / 8", "static_cast<uint32_t>(first + i) & 4095u, strip / 8", f"native::{MANY_ROWS}"),
    "cpu: masks of what is written wrap at row 4096": (CPU + "low_rank.inl", "static_cast<uint32_t>(first + m), k / 8", "static_cast<uint32_t>(first + m) & 4095u, k / 8", f"native::{MANY_ROWS}"),
    "cpu: rows of masks counted in 16 bits": (CPU + "low_rank.inl", "dropout.row + m,", "dropout.row + (m & 65535u),", "native::test_masks_of_as_many_rows_as_a_batch_has"),
    "cpu: the last columns of a row lost": (CPU + "few_rows.inl", "k < columns; k += O::kStep) {\n    const int count", "k + O::kStep <= columns; k += O::kStep) {\n    const int count", "few_rows::test_values"),
    "cpu: long sums not split": (CPU + "few_rows.inl", "constexpr int kShare = 32;", "constexpr int kShare = 1 << 20;", "few_rows::test_sums_of_long_rows_stay_exact"),
    "cpu: masters not rounded in columns": (CPU + "few_rows.inl", "column = rounded<kType>(kV == 1 ? load_some(row, count) : load(row + c * W));", "column = kV == 1 ? load_some(row, count) : load(row + c * W);", f"few_rows native::{LARGE}"),
    "cpu: masters not rounded where packed": (CPU + "packed.inl", "return rows ? pack_rows<float, Type::kHalf> : pack_columns<float, Type::kHalf>;", "return rows ? pack_rows<float, Type::kFloat> : pack_columns<float, Type::kFloat>;", "few_rows::test_masters_are_rounded_at_use"),
    "cpu: long sums not split where packed": (CPU + "packed.inl", "V sum[kRows][kVectors] = {};", "V sum[kRows][kVectors] = {};\n    for (int i = 0; adds && i < kRows && m + i < of.last; ++i)\n      for (int c = 0; c < kVectors; ++c) {\n        sum[i][c] = load(sums + (m + i - of.first) * kPanel + c * W);\n        store(sums + (m + i - of.first) * kPanel + c * W, splat(0.f));\n      }", "few_rows::test_sums_of_long_rows_stay_exact"),
    "cpu: groups of panels past the first lost": (CPU + "packed.inl", "from < range.last; from += kGroup * kPanel) {", "from < range.last; from += range.last) {", "native_packed"),
    "cpu: the low-rank part lost where packed": (CPU + "packed.inl", "if (begin < end)", "if (begin > end)", "few_rows::test_values"),
    "cpu: rows of another group given a part": (CPU + "packed.inl", "if (m + i < of.first || m + i >= of.last) continue;", "if (m + i < of.first) continue;", "native_packed"),
    "cpu: rows packed where they lie": (CPU + "packed.inl", "(places != nullptr ? places[m] : m) * x.row_stride", "m * x.row_stride", "native_packed"),
    "cpu: dB of the first rows of s": (CPU + "grouped_packed.cpp", "rows_from(S, first, count)", "rows_from(S, 0, count)", "native_packed"),
    "cpu: the first part of low for all": (CPU + "grouped_packed.cpp", "low + (begin - first) * many.pitch", "low", "native_packed"),
    "cpu: dB by rows of s not added up": (CPU + "linear.cpp", "add(c, sum_b.data, pitch_b, nullptr, first, N)", "add(c, sum_b.data, pitch_b, nullptr, 0, N)", "few_rows::test_many_rows_some_at_a_time"),
    "blocks: the first block's mask of dx in 16 bits": ("backends/packed.py", "_after", "native.dropped(branch).after(rows).seed", "branch.seed", "packed"),
    "blocks: frozen layers add to dx in 16 bits": ("backends/packed.py", "_through_frozen", "into=torch.empty_like(onto)", "into=None", "packed"),
    "cpu: power of two left in s": (CPU + "linear.cpp", "static_cast<float>(1 / high)", "1.f", "few_rows::test_values"),
    "cpu: factor of dropout lost in ds": (CPU + "linear.cpp", "static_cast<float>(scaling * keep)", "static_cast<float>(scaling)", "few_rows::test_a_step_of_training_in_two_calls"),
    "cpu: every share has the first rows' mask": (CPU + "linear.cpp", "all->row += static_cast<uint32_t>(first);", "", "few_rows::test_many_rows_some_at_a_time"),
    "cpu: dx not added": (CPU + "linear.cpp", "if (onto) add_rows", "if (false) add_rows", "few_rows::test_many_rows_some_at_a_time"),
    "cpu: gradients of the last rows alone": (CPU + "linear.cpp", "c.accumulate = first > 0;", "c.accumulate = false;", "few_rows::test_many_rows_some_at_a_time"),
    "cpu: the last of odd columns lost": (CPU + "pairs.inl", "columns % 2 != 0", "false", "native"),
    "cpu: ranks of sums past the first four lost": (CPU + "factors.inl", "matrix + j * terms, terms", "matrix, terms", "native"),
    "cpu: mask lost in dx": (CPU + "linear.cpp", "0, count, drop, sum.data, pitch)", "0, count, nullptr, sum.data, pitch)", "few_rows::test_a_step_of_training_in_two_calls"),
    "quantised: the last block of a row lost": ("weights/layouts.py", "FourBit._values", "columns.stop // block", "(columns.stop - 1) // block", "layouts"),
    "quantised: blocks across rows from the row's start": ("weights/layouts.py", "FourBit._flat", "first - begin : last - begin", ": last - first", "layouts"),
    "quantised: zeros of GPTQ one too small": ("weights/layouts.py", "Gptq._values", "+ self.less", "", "layouts"),
    "quantised: AWQ's columns in order": ("weights/layouts.py", None, "(0, 4, 1, 5, 2, 6, 3, 7)", "(0, 1, 2, 3, 4, 5, 6, 7)", "layouts"),
    "quantised: scales not looked at": ("weights/record.py", "check_finite", "not tensor.is_meta and", "False and", "layouts"),
    "quantised: codes of another order taken": ("weights/owners.py", "_of_params4bit", 'state, "packing_format_for_cpu", False', 'state, "no such", False', "layouts"),
    "quantised: half of the weight in a strip": ("backends/dequantized.py", None, "_SHARE = 4", "_SHARE = 2", "every_layout"),
    "quantised: all of GPTQ's scales for some rows": ("weights/layouts.py", "Gptq._values", "self.group_scales[:, rows][group]", "self.group_scales[group][:, rows]", "every_layout"),
    "quantised: a weight that trains": ("weights/tensor.py", "_refuse_training", "if requires_grad and", "if False and", "quantize_base"),
    "quantised: parts that train": ("weights/record.py", "expect", "if tensor.requires_grad:", "if False:", "quantized_op"),
    "quantised: scales of blocks taken for those of rows": ("weights/owners.py", "from_fp8", "tuple(scale.shape) in ((N,), (N, 1))", "scale.numel() == N", "layouts"),
    "quantised: strips of rows skipped": ("backends/dequantized.py", "product", "in blocked.blocks(N, step):", "in [slice(0, min(N, step))]:", "quantized_op"),
    "quantised: the branch lost in dx": ("quantized.py", "_backward", "dequantized.add_gradient(dx, dy, weight)", "dequantized.add_gradient(dx.zero_(), dy, weight)", "quantized_op"),
    "quantised: kernels past a forced reference": ("backends/native/quantized.py", "_is_left", "forced.now is not None and", "False and", "native_quantized"),
    "quantised: another kind after merging": ("weights/quantize.py", "like", '"nf4" if record.zero is None else "int4"', '"nf4"', "quantize_base"),
    "quantised: the merged sum counted against itself": ("nn/merging.py", "Merging.merge_quantised", "(held - base)", "held", "quantize_base"),
    "quantised: tied weights quantised": ("quantizing.py", "quantize_layers", "        if beside:", "        if False:", "quantize_base"),
    "quantised: trained adapters started anew": ("quantizing.py", "_why_no_start", "bool(layer.lora_B.any())", "False", "quantize_base"),
    "quantised: bases of another dtype read": ("integrations/peft_bases.py", "record_of_base", "owner.compute_dtype not in (None, dtype)", "False", "peft_bases"),
    "quantised: evaluation lays codes out anew": (INTEGRATION, "_Fused._of_base", "if record is None:", "if True:", "peft_bases"),
    "cpu: scales in turn without their mean": (CPU + "coded.inl", "product + splat(c.offset)", "product", "native_quantized"),
    "cpu: sums of few bits not scaled": (CPU + "coded.inl", "sum[i][j] = sum[i][j] * scale;", "sum[i][j] = sum[i][j] * splat(p.coded->factor);", "native_quantized"),
    "cpu: values of 4 bits not rounded": (CPU + "coded.inl", "rounded<kType>((load(c.table + i * W) - zero) * factor)", "(load(c.table + i * W) - zero) * factor", "native_quantized"),
    "decoding: the smallest of e4m3 lost": (TRITON + "decoding.py", "decoded_e4m3", "0.001953125", "0.0", "interpreted_decoding"),
    "decoding: nobody's columns": (TRITON + "decoding.py", "coded_kernel", "store_tile(Matrix(y, 1, N, N, M), acc, cols, rows)", "store_tile(Matrix(y, 1, N, N - 1, M), acc, cols, rows)", "interpreted_decoding"),
    "grouped: rows of another group": (GROUPED, "Members.take", "rows[self.order[place]]", "rows[place]", "grouped"),
    "grouped: one seed for all": (GROUPED, "Adapters.branch", "self.seeds[group]", "self.seeds[0]", "grouped"),
    "grouped: rows past all not zero": (GROUPED, "_without_strangers", "if members.served < len(rows):", "if False:", "grouped"),
    "grouped: rows of nobody by another kernel": (GROUPED, "frozen_for_nobody", "if members.bounds[-2] < members.bounds[-1]:", "if False:", "few_rows grouped"),
    "grouped: all by another kernel beside rows of nobody": (GROUPED, "frozen_for_nobody", "members.put(y, nobody, members.take(frozen, nobody))", "y.copy_(frozen)", "grouped"),
    "cpu: a group's kernels by the number of groups": ("backends/native/grouped.py", "serves", "return any(", "return 1 < sum(", "grouped"),
    "grouped: one weight of two tenants": ("branch.py", "Experts.base", "self.weight_of[group]", "group % len(self.weight)", "grouped"),
    "grouped: groups without rows moved": ("grouped/direct.py", "with_rows", "t if bounds[i] < bounds[i + 1] or not t.requires_grad else t.detach()", "t", "grouped"),
    "cpu: the mask of a group from its first row in the batch": (CPU + "grouped.h", "threshold, 0, 0};", "threshold, static_cast<uint32_t>(bounds[g]), 0};", "grouped native_grouped"),
    "cpu: few rows of nobody by another kernel": ("grouped/direct.py", "_inferred", "if bounds[-2] < bounds[-1]:", "if False:", "native_grouped"),
    "cpu: few rows in the order of the groups": (CPU + "grouped.cpp", "groups.order[at + m] : at + m;", "at + m : at + m;", "native_grouped"),
    "cpu: few rows past all not zero": (CPU + "grouped.cpp", "  std::memset(out + groups.bounds.back()", "  if (false) std::memset(out + groups.bounds.back()", "native_grouped"),
    "cpu: rows of a group not written back": (CPU + "grouped.cpp", "    out.put(groups, g, y);", "", "grouped native_grouped"),
    "experts: adapters of PEFT by another expert": ("integrations/peft_experts.py", "_adapter", "B.view(B.shape[0], -1, E).permute(2, 0, 1)", "B.view(B.shape[0], E, -1).permute(1, 0, 2)", "experts"),
    "mixed batches: one adapter for all": (INTEGRATION, "_Fused._mixed_batch_forward", "name if name in self.lora_A else None for name", "adapter_names[0] if name in self.lora_A else None for name", "mixed_batches"),
    "direct: the profiler unseen": ("_dispatch.py", "is_unwatched", "profiler._is_profiler_enabled or ", "", "few_rows::test_who_watches_sees_the_op"),
    "direct: modes unseen": ("_dispatch.py", "is_plain", "not _len_torch_function_stack()", "True", "few_rows::test_who_watches_sees_the_op"),
    "direct: modes below unseen": ("_dispatch.py", "is_plain", "not _len_torch_dispatch_stack()", "True", "few_rows::test_who_watches_sees_the_op"),
    "direct: subclasses taken": ("_dispatch.py", "is_plain", "type(x) in _TENSORS", "isinstance(x, Tensor)", "few_rows::test_what_is_traced_compiled_or_no_plain_tensor"),
    "direct: a base that trains taken": ("direct.py", "linear", "weight.requires_grad or", "False or", "few_rows::test_a_base_that_trains_goes_by_the_op"),
    "direct: graphs of a backward lost": ("direct.py", "_Linear.backward", "watched = torch.is_grad_enabled() or", "watched =", "few_rows::test_other_ways_to_ask_for_gradients"),
    "layer: an overridden product taken as it lies": ("nn/layer.py", "LoRALayer._directly", " or not self._as_it_lies:", ":", "few_rows::test_parameters_that_do_not_lie_as_they_act"),
    "layer: the base of a merged layer taken for it": ("nn/layer.py", "LoRALayer._directly", "if idle and (self._merged or", "if idle and (False or", "few_rows::test_states_of_a_layer"),
    "native: power of two dropped in y": (NATIVE, "forward", "lora_b.t(), high)", "lora_b.t(), 1.0)", f"native::{LARGE}"),
    "native: power of two dropped in lora_add": (NATIVE, "forward", "y, high, accumulate", "y, 1.0, accumulate", f"native::{LARGE}"),
    "native: power of two dropped in place": (NATIVE, "add_", "base_out, high, accumulate", "base_out, 1.0, accumulate", "native::test_in_place_on_any_strides"),
    "native: power of two dropped in place, on strides": (NATIVE, "add_", "y, high, accumulate", "y, 1.0, accumulate", "native::test_in_place_on_any_strides"),
    "native: power of two dropped in dB": (NATIVE, "_low_rank_backward", "split(branch.scaling, dy.dtype)[1]", "1.0", f"native::{LARGE}"),
    "native: fp64 taken": ("backends/native/extension.py", None, "torch.bfloat16, torch.float16)", "torch.bfloat16, torch.float16, torch.float64)", "native"),
    "scaling: fp16 not split": (SCALING, "split", "dtype != torch.float16 or", "True or", f"accuracy::{LARGE}"),
    "scaling: negative ones not split": (SCALING, "split", "abs(scaling) <= 1", "scaling <= 1", f"accuracy::{LARGE}"),
    "scaling: other dtypes split": (SCALING, "split", "dtype != torch.float16", "dtype == torch.float64", "scaling"),
    "scaling: factor of s above one": (SCALING, "split", "return below_one, 2.0**exponent", "return 2 * below_one, 2.0 ** (exponent - 1)", "scaling"),
    "blocks past the 16th lost in dA and dB": (BLOCKED, "backward", "in blocks(M, _step(dy, K, dy.shape[1])):", "in list(blocks(M, _step(dy, K, dy.shape[1])))[:16]:", f"accuracy::{MANY_BLOCKS}"),
    "blocks past the 16th lost in dB": (BLOCKED, "_Sums.add", "if self._wanted.b:\n", "if self._wanted.b and block.start < 1024:\n", f"accuracy::{MANY_BLOCKS}"),
    "blocks past the 16th lost in the weight's gradient": (BLOCKED, "weight_gradient", "in blocks(M, step):", "in list(blocks(M, step))[:16]:", f"accuracy::{MANY_BLOCKS}"),
    "masks of blocks wrap at row 4096 forward": (BLOCKED, "_shrink", "block.start", "block.start % 4096", f"accuracy::{MANY_BLOCKS}"),
    "masks of blocks wrap at row 4096 backward": (BLOCKED, "_Sums.add", "_mask(branch, block.start", "_mask(branch, block.start % 4096", f"accuracy::{MANY_BLOCKS}"),
    "power of two dropped in blocked dB": (BLOCKED, "_Sums.add", "_summed(self._d_b, s.t(), rows, high)", "_summed(self._d_b, s.t(), rows, 1.0)", f"accuracy::{LARGE}"),
    "masks wrap at row 4096": (DROPOUT, "keep_mask", "torch.arange(first_row, first_row + rows, dtype=torch.int64, device=seed.device)", "torch.arange(first_row, first_row + rows, dtype=torch.int64, device=seed.device) % 4096", "dropout::test_rows_are_counted_past"),
    "masks wrap at row 65536 of a call": (DROPOUT, "keep_mask", "torch.arange(first_row, first_row + rows, dtype=torch.int64, device=seed.device)", "first_row + torch.arange(rows, dtype=torch.int64, device=seed.device) % 65536", "dropout::test_rows_of_one_call_are_counted_past_65536"),
    "triton: partial sums past the 16th lost": (TRITON + "reduce.py", "sum_partials", "range(tl.cdiv(job.parts, LANES))", "range(tl.minimum(tl.cdiv(job.parts, LANES), 2))", f"{PLANS}::{MANY_ROWS}"),
    "triton: second sum scaled as the first": (TRITON + "reduce.py", "reduce_kernel", "size_1, scale_1), pid - blocks", "size_1, scale_0), pid - blocks", f"{KERNEL_OPS}::{LARGE}"),
    "triton: masks wrap at row 4096": (TRITON + "blocks.py", "keep_tile", "rows = row_0 + rows", "rows = row_0 + rows % 4096", f"{PLANS}::{MANY_ROWS}"),
    "triton: row tiles past the 16th over others in dB": (TRITON + "gradients.py", "ds_db_kernel", "part_db += tile.to(tl.int64)", "part_db += (tile % 16).to(tl.int64)", f"{PLANS}::{MANY_ROWS}"),
    "triton: steps of a share past the 4th lost in dA": (TRITON + "gradients.py", "tall_tile", "for i in range(steps):", "for i in range(tl.minimum(steps, 4)):", f"{PLANS}::{MANY_ROWS}"),
    "triton: shares past the 16th over others in grouped dA": (TRITON + "grouped.py", "dx_da_kernel", "item // ranks, TALL_R", "item // ranks % 16, TALL_R", f"{PLANS}::{MANY_ROWS}"),
    "triton: power of two dropped in dB": (TRITON + "gradients.py", "ds_db", "(part_db, db, high)", "(part_db, db, 1.0)", f"{KERNEL_OPS}::{LARGE}"),
    "triton: power of two dropped in dB alone": (TRITON + "branch.py", "gradients", 'tile.get("db"), high)', 'tile.get("db"))', f"{PLANS}::{MANY_ROWS}"),
    "triton: power of two dropped in lora_add": (TRITON + "branch.py", "add", "LowRank(s, b.t(), high)", "LowRank(s, b.t())", f"{KERNEL_OPS}::{LARGE}_on_top_of_a_base"),
    "triton: rows not in the key": (TRITON + "launch.py", "_key", "arg.bit_length() > 31 if", "None if", "triton_launch"),
    "triton: launches of a profiler unseen": (TRITON + "launch.py", "_is_watched", "return bool(calls[0] or calls[1] or kernel.pre_run_hooks)", "return False", "triton_launch"),
    "tiles: fields of a table ignored": (TRITON + "tiles.py", "replaced", "tile._replace(**fields) if fields else tile", "tile", "triton_backend"),
    "plans: tiles of a table at any rank": (TABLES, "nearest", 'call.aligned and call.r <= max(16, bucket["r"])', "call.aligned", "triton_backend"),
    "plans: tiles of a table for any strides": (TABLES, "nearest", "call.aligned and call.r", "call.r", "triton_backend"),
    "plans: unproven ones taken": (TABLES, "nearest", "and proven and serves", "and serves", "triton_backend"),
    "plans: decode of any number of rows": (PLAN, "Pass.refusal", "self.most_rows < call.M", "False", "triton_backend"),
    "fused experts' adapters lost in silence": ("checkpoint.py", "_sort", "left_out.append(\n                f\"{layer}: {why} (fused", "str(\n                f\"{layer}: {why} (fused", "peft_targets"),
    "files of two saves taken for one": ("formats.py", "read", "for key, value in paired.items():", "for key, value in ():", "checkpoint"),
    "leftovers of dead savers stay": ("files.py", "replace_together", "    _sweep(writers)\n", "", "files"),
    "living savers' files swept": ("files.py", "_hold", "fcntl.flock(descriptor, fcntl.LOCK_SH)", "pass", "files"),
    "folders not flushed": ("files.py", "replace_together", "for folder in {path.parent for path in writers}:", "for folder in ():", "files"),
    "pipes waited for": ("files.py", "open_regular", "if not stat.S_ISREG(status.st_mode):", "if False:", "files"),
    "files of mode 0600": ("files.py", "_temporary", "os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666", "os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600", "files"),
    "repeats at least once": ("patterns.py", "Matcher._repeated", "found, new = set(places), places", "found, new = set(), places", "patterns"),
    "flipped bits not noticed": ("adapter_files.py", "read_safetensors", "if DIGEST in metadata and", "if False and", "formats"),
    "code of pickled files run": ("adapter_files.py", "read_pickled", "weights_only=True)\n", "weights_only=False)\n", "formats"),
    "shards outside the folder": ("adapter_files.py", "read_sharded", "_SHARD.fullmatch(name)", "True", "formats"),
    "lora_dropout of a file not set": ("checkpoint.py", "_load", "        one.dropout = config.dropout\n", "", "formats"),
    "strict ignored": ("checkpoint.py", "_say", "if left_out and strict:", "if False:", "formats"),
    "layers missing in a file not said": ("checkpoint.py", "_say", "    if missing:\n        left_out", "    if False:\n        left_out", "formats"),
    "weights beside the adapter not compared": ("checkpoint.py", "_sort", "elif not _is_same(tensor, tensors_there[name]):", "elif False:", "formats"),
    "weights beside the adapter trained": ("checkpoint.py", "_sort", "and config.is_saved(name.rpartition(\".\")[0]):", "and True:", "formats"),
    "kohya's alpha ignored": ("formats.py", "_read_one_file", 'if "alpha" in roles else', "if False else", "formats"),
    "MLX's scale taken for alpha": ("formats.py", "_read_mlx", "{n: scale * r for n, r in ranks.items()}", "{n: scale for n, r in ranks.items()}", "formats"),
    "options switched on and unknown not said": ("peft_config.py", "Config.unknown", "if value and name not in known", "if False", "formats"),
    "PEFT's layers taken for targets": ("targets.py", "find_targets", "    require_no_peft(model)\n    require_shapes", "    require_shapes", "checkpoint"),
    "an interrupted apply_lora not undone": ("adapters.py", "all_or_nothing", "        before.restore()\n", "        pass\n", "all_or_nothing"),
    "classes not brought back": ("adapters.py", "Before.restore", "            module.__class__ = kind\n", "", "all_or_nothing"),
    "flags not brought back": ("adapters.py", "Before.restore", "            parameter.requires_grad_(flag)\n", "            pass\n", "all_or_nothing"),
    "PiSSA's weights not kept": ("convert.py", "_apply", "before.keep(linear.weight)", "pass", "all_or_nothing"),
    "adapters not kept while loading": ("checkpoint.py", "_load", "before.keep(trained)", "pass", "all_or_nothing"),
    "saved modules not kept while loading": ("checkpoint.py", "_load", "        before.keep(target)\n", "", "all_or_nothing"),
    "alpha kept as it was given": ("options.py", "check_alpha", "return int(value) if isinstance(value, numbers.Integral) else float(value)", "return value", "options"),
    "a bool taken for a number": ("options.py", "_number", "if isinstance(number, bool) or not", "if not", "options nn"),
    "the last pattern wins": ("options.py", "of_layer", "in (patterns or {}).items():\n        if any", "in reversed((patterns or {}).items()):\n        if any", "options"),
    "patterns without a target taken": ("options.py", "of_layers", "        if not found:\n", "        if False:\n", "options"),
    "options of PEFT dropped": ("options.py", "_require_supported", "        if value and value != field.default:", "        if False:", "options"),
    "layers_to_transform dropped": ("options.py", "from_peft", "if config.layers_to_transform not in (None, []):", "if False:", "options"),
    "PEFT's heads dropped": ("options.py", "from_peft", "dict.fromkeys((*(config.modules_to_save or ()), *heads))", "dict.fromkeys(config.modules_to_save or ())", "options"),
    "init_lora_weights=False dropped": ("options.py", None, 'False: "random"', 'False: "kaiming"', "options"),
    "new heads adapted": ("targets.py", "new_heads", "            heads[name] = module\n", "            pass\n", "heads"),
    "loaded heads taken for new": ("targets.py", "_is_loaded", 'return getattr(parameter, "_is_hf_initialized", False)', "return False", "heads"),
    "an excluded head trained": ("targets.py", "new_heads", "if excluded.match(*places[module]) or (", "if False and (", "heads"),
    "a named head trained in full": ("targets.py", "new_heads", "elif not wanted.is_for(places[module], inside, set().union(*linear.values()) - inside):", "else:", "heads"),
    "a head loaded in part adapted": ("targets.py", "_new_parts", "_is_new(c, all if body is None else any)", "_is_new(c, all)", "heads"),
    "parts of a head written one by one": ("adapters.py", "saved_modules", "            inside.update(module.modules())\n", "", "heads"),
    "biases of experts listed": ("targets.py", "_kind", "    if not matrix or vectors or _ELEMENTWISE.search(attribute):", "    if not matrix:", "convert"),
    "vectors of experts listed": ("targets.py", "_kind", "not matrix or vectors or", "not matrix or", "convert"),
    "experts matched in silence": ("targets.py", "find_targets", "lambda predicate: _what_else(model, predicate)", "lambda predicate: None", "convert"),
    "what is trained in full said to be frozen": ("targets.py", "others", "is_linear(module) or module in trained:", "is_linear(module):", "convert"),
    "skipped layers not folded": ("convert.py", "LoraReport.__str__", "reasons.setdefault(reason, []).append(name)", "reasons.setdefault(reason + name, []).append(name)", "convert"),
    "lazy layers not refused": ("targets.py", "require_shapes", "if is_lazy(parameter):", "if False:", "options"),
    "weights without values merged": ("nn/tensors.py", "LayerTensors.why_valueless", "            if tensor.is_meta:\n", "            if False:\n", "weights"),
    "subclasses taken for weights": ("bases.py", "odd_type", "    if decides and not is_sharded", "    if False and not is_sharded", "weights"),
    "odd dtypes taken for weights": ("bases.py", "odd_type", "if tensor.dtype not in _DTYPES:", "if False:", "weights"),
    "computed tensors taken for parameters": ("bases.py", "computed", "if name in module._parameters or name in module._buffers:", "if hasattr(module, name):", "weights"),
    "pruned factor as of the last forward": ("nn/tensors.py", "Factors.factor", "hook.apply_mask(self)", "getattr(self, name)", "weights"),
    "offloaded adapter not read": ("offloading.py", "present", "hook: Any = module._hf_hook if is_offloaded(module) else None", "hook: Any = None", "weights"),
    "half a merge kept": ("nn/merging.py", "Merging.merge", "                self.weight.copy_(self._kept_base())\n            self.merged_base", "                pass\n            self.merged_base", "weights"),
    "merges before an error kept": ("convert.py", "merge_lora", "            for name in done:\n                layers[name].unmerge()", "            pass", "weights"),
    "ties by memory not seen": ("targets.py", "owners", "for one, other in _overlaps(found):", "for one, other in ():", "weights"),
    "columns of one matrix taken for tied": ("targets.py", "_meet", "return bool(second.any())", "return True", "weights"),
    "head with an adapter replaced": ("adapters.py", "attach", "    _guard_embeddings(model)\n", "", "weights"),
    "same size taken for a resize": ("adapters.py", "_keeps_size", "new_num_tokens in (None, size)", "new_num_tokens is None", "weights"),
    "layouts: sparse taken by the raw op": ("_checks.py", "check_layout", "if tensor.layout is not torch.strided:", "if False:", "ops_checks"),
    "layouts: good case blind to them": ("_checks.py", "are_sound", "if tensor.layout is not _STRIDED or tensor.is_nested:", "if False:", "functional"),
    "layouts: overlap of columns unseen": ("_checks.py", "_overlaps_itself", "and down // step < columns", "and down < 0", "ops_checks"),
    "layouts: base_out may overlap": ("_checks.py", "check_written", "if not base_out.is_contiguous() and", "if False and", "ops_checks"),
    "layouts: base_out may be x": ("_checks.py", "check_written", "if _share_memory(base_out, x):", "if False:", "functional"),
    "layouts: columns side by side wrap": ("_checks.py", "_share_memory", "return gap < width or gap + reach > pitch", "return gap < width", "ops_checks"),
    "seed: rows wrap": ("_checks.py", "_check_place", "0 <= row <= ROWS - rows", "0 <= row", "ops_checks"),
    "seed: columns wrap": ("_checks.py", "_check_place", "0 <= column <= COLUMNS - columns", "0 <= column", "ops_checks"),
    "trace without scaling": (FUNCTIONAL, "_traced", "= scaling * F.linear(F.linear(F.dropout", "= F.linear(F.linear(F.dropout", "functional"),
    "trace forgets the seed": (FUNCTIONAL, "_traced", "if dropout_p and seed is not None:", "if False:", "functional"),
    "fused PEFT: sparse x taken": (INTEGRATION, "_Fused.forward", "or x.layout is not torch.strided", "", "integrations_peft"),
    "fused PEFT: nested x taken": (INTEGRATION, "_Fused.forward", "or x.is_nested", "", "integrations_peft"),
    "fused PEFT: complex x taken": (INTEGRATION, "_Fused._has_dtypes_of_the_op", "x.dtype not in DTYPES or ", "", "integrations_peft"),
    "fused PEFT: sparse weight taken": (INTEGRATION, "_module_objection", "types is not None and parameter.layout is not torch.strided", "False", "integrations_peft"),
    "fused PEFT: fp64 adapters under autocast": (INTEGRATION, "_Fused._has_dtypes_of_the_op", "cast = autocast and low != torch.float64", "cast = autocast", "integrations_peft"),
    "resume: Python's generator not restored": (RECIPES + "resume.py", "_set_random", "    random.setstate(state[\"python\"])\n", "", "resume"),
    "resume: the loader's generator not restored": (RECIPES + "resume.py", "_set_random", "        generator.set_state(value)\n", "        pass\n", "resume"),
    "resume: the epoch in another order": (RECIPES + "resume.py", "_seek", "    _set_random(epoch_random, loader)\n", "", "resume"),
    "resume: GradScaler's state not restored": (RECIPES + "resume.py", "Run._apply", "        self.scaler.load_state_dict(state[\"scaler\"])\n", "", "resume"),
    "resume: buffers missing from the checkpoint": (RECIPES + "undo.py", "moving_tensors", "return trained | buffers", "return trained", "resume"),
    "resume: the best forgotten": (RECIPES + "resume.py", "Run._apply", "self.epoch_random, self.best = state[\"epoch_random\"], state[\"best\"]", "self.epoch_random = state[\"epoch_random\"]", "resume"),
    "resume: inf and nan taken for values": (RECIPES + "resume.py", "Run._check_tensors", "finite = not like.requires_grad or bool(tensors[name].isfinite().all())", "finite = True", "resume"),
    "resume: integers of any size": (RECIPES + "reading.py", "is_integer", " and -(2**63) <= value < 2**63", "", "resume"),
    "resume: checksums unread": (RECIPES + "reading.py", "_require_intact", "if (name := archive.testzip()) is not None:", "if False:", "resume"),
    "resume: no step tried": (RECIPES + "resume.py", "Run.load", "if comparable and not self.done:", "if False:", "resume"),
    "resume: errors of loading pass": (RECIPES + "resume.py", "Run.load", "except Exception as error:  # of the", "except ZeroDivisionError as error:  # of the", "resume"),
    "resume: layers packed anew": (RECIPES + "resume.py", "Run.load", "            load_packs(self.model, state[\"packs\"])\n", "", "resume::test_layers_are_computed_together_from_the_step_on_that_they_were"),
    "resume: what packs have seen is forgotten": ("packs.py", "Pack.of_state", "pack._seen = [modules[name] for name in state[\"seen\"]]", "pass", "resume::test_layers_are_computed_together_from_the_step_on_that_they_were"),
    "commands: padding is learned": (COMMANDS + "texts.py", "_row", "[*labels, *[IGNORED] * left]", "[*labels, *[padding] * left]", "texts"),
    "commands: a document learned from the one before": (COMMANDS + "texts.py", "_row", "[IGNORED, *document.labels[1:]]", "document.labels", "texts"),
    "commands: prompts are learned": (COMMANDS + "texts.py", "encode", "*[IGNORED] * len(prompt)", "*prompt", "texts"),
    "commands: padding is a document": (COMMANDS + "finetune.py", "run", "any(row.documents > 1 for row in rows)", "any(0 in row.positions[1:] for row in rows)", "commands::test_it_is_said_where_documents_of_a_row_see_each_other"),
    "commands: kohya's alpha without rsLoRA": ("format_writers.py", "write_kohya", "layer.plain_alpha", "layer.alpha", "writers::test_there_and_back_it_computes_the_same"),
    "resume: a step tried after the last": (RECIPES + "resume.py", "Run.load", "if comparable and not self.done:", "if comparable:", "resume"),
    "resume: parameters of the step tried unseen": (RECIPES + "trial.py", "step_problem", "if not all(p.isfinite().all() for", "if False and not all(p.isfinite().all() for", "resume"),
    "resume: generators changed by a refusal": (RECIPES + "resume.py", "Run.load", "            _set_random(before, self.loader)\n", "", "resume"),
    "undo: alpha of the step undone": (RECIPES + "undo.py", "Undo.__init__", '(*layer.adapter_names(), "alpha")', "layer.adapter_names()", "adjust_rank"),
    "undo: gradients lost": (RECIPES + "undo.py", "Undo.__call__", "            parameter.grad = grad\n", "            pass\n", "resume adjust_rank"),
    "undo: the optimizer's state lost": (RECIPES + "undo.py", "Undo.__call__", "        self.optimizer.state.update(self.state)\n", "", "adjust_rank"),
    "undo: the scheduler as it was undone": (RECIPES + "undo.py", "Undo.__call__", "        if self.scheduler is not None:\n", "        if False:\n", "adjust_rank"),
    "undo: trained values kept": (RECIPES + "undo.py", "Undo.__call__", "            tensor.copy_(value)\n", "            pass\n", "adjust_rank"),
    "training: a plateau without held-out losses": (RECIPES + "training.py", "train_model.evaluate", "            scheduler.step(found[\"loss\"])\n", "            pass\n", "training_loops"),
    "training: a plateau without losses of epochs": (RECIPES + "training.py", "train_model", "                        scheduler.step(history.epoch_loss[-1])\n", "                        pass\n", "training_loops"),
    "training: gradients add up in a closure": (RECIPES + "training.py", "_closure.evaluate", "        _zero_grad(model, optimizer)\n        return torch.stack", "        return torch.stack", "training_loops"),
    "training: the best not restored": (RECIPES + "training.py", "train_model", "            run.restore_best()\n", "            pass\n", "training_loops"),
    "training: schedulers count steps left out": (RECIPES + "training.py", "_step", " and scaler.get_scale() >= scale", "", "training_loops"),
    "training: a scheduler of another optimizer": (RECIPES + "stepping.py", "check_scheduler", "if own.param_groups is not optimizer.param_groups:", "if False:", "training_loops"),
    "training: a plateau that wants losses to grow": (RECIPES + "stepping.py", "check_scheduler", "if scheduler.mode != \"min\":", "if False:", "training_loops"),
    "training: fp16 with a closure": (RECIPES + "stepping.py", "check_closure", "    if autocast_dtype == torch.float16:\n", "    if False:\n", "training_loops"),
    "callbacks: any difference is better": (RECIPES + "callbacks.py", "Goal.better", "self.sign * (than - value) > by", "self.sign * (than - value) > 0", "training_loops"),
    "callbacks: nan is better than nothing": (RECIPES + "callbacks.py", "Goal.better", "        if math.isnan(value):\n", "        if False:\n", "training_loops"),
    "callbacks: the table without its last step": (RECIPES + "callbacks.py", "CSV.on_end", "    def on_end(self, run: Any) -> None:\n        self._write(run, len(run.history))\n", "", "training_loops"),
    "merged_state_dict of a tied weight": ("merged.py", "merged_state_dict", '    require_untied(model, layers.values(), "merged_state_dict")\n', "", "merged"),
    "what modules hold not brought back": ("adapters.py", "Before.restore", "                (held[key].extend if isinstance(content, list) else held[key].update)(content)\n", "", "all_or_nothing"),
    "alpha of zero": ("options.py", "check_alpha", "    if value == 0:", "    if False:", "nn"),
    "16-bit adapters by default": ("nn/layer.py", "LoRALayer._fill", "(torch.float32 if half else self.weight.dtype)", "self.weight.dtype", "nn"),
    "check: buffers not restored": ("check/runs.py", "unchanged.rewind", "if not torch.equal(tensor, value):", "if False:", "check"),
    "check: the batch's containers given away": ("check/runs.py", "run", "model(*_containers(inputs)", "model(*inputs", "check"),
    "check: adapters that are computed by their attribute": ("check/found.py", "find_adapters", "(one.factor_parameters(half) for half in (\"lora_A\", \"lora_B\"))", "([getattr(one, half)] for half in (\"lora_A\", \"lora_B\"))", "check"),
    "check: nothing compared is agreement": ("check/merging.py", "_merges", "if not apart or [", "if [", "check"),
    "check: zero factors that no optimizer holds": ("check/__init__.py", "first_step_problems", "and not nonzero(adapter.B):", "and False:", "check"),
    "lists of modules not restored": ("adapters.py", "_contents", "(dict, set, list, OrderedDict)", "(dict, set, OrderedDict)", "check"),
    "merged_state_dict with keys of parametrizations": ("nn/state.py", "LayerState.is_beside_the_base", "return rest[0] in beside", "return False", "merged"),
    "merged_state_dict with masks": ("nn/state.py", "LayerState.is_beside_the_base", ' or first.startswith(tuple(f"{n}_" for n in self.adapter_parameters))', "", "merged"),
    "patterns for wrapped names": ("convert.py", "_apply", "modules, places = dict(names.named_modules(model)), names", "modules, places = dict(model.named_modules()), names", "names"),
    "adapted though trained in full": ("convert.py", "_apply", "targets.submodules(saved) | {one.module for one in adapters.saved_tensors(model)}", "targets.submodules(saved)", "options"),
    "trained in full though adapted": ("targets.py", "find_saved", "        if any(isinstance(part, LoRALayer) for part in module.modules()):\n            raise ValueError(\n                f\"modules_to_save", "        if False:\n            raise ValueError(\n                f\"modules_to_save", "options"),
    "adapters that cannot train": ("nn/layer.py", "LoRALayer._fill", "    @torch.inference_mode(False)  # in which", "    # in which", "nn"),
    "tied layer a target by default": ("targets.py", "_left_out", "        if beside:\n", "        if False:\n", "targets"),
    "head of the outermost model only": ("targets.py", "_left_out", "        if isinstance(head, nn.Module):\n", "        if isinstance(head, nn.Module) and module is model:\n", "targets"),
    "new heads of the outermost model only": ("targets.py", "_all_new_parts", "        if module not in inside and isinstance", "        if module is model and isinstance", "targets"),
    "packed: a bias where there is none": ("backends/triton/packed.py", "packed_kernel", "* _WORDS + 2) != 0", "* _WORDS + 2) == 0", "interpreted_packed"),
    "packed: dx of one layer twice": ("backends/triton/packed.py", "of_step", "step < second, two", "step < second, one", "interpreted_packed"),
    "wrappers in names of targets": ("targets.py", "find_targets", "places = all_names(model)\n    wanted", "places = {module: [name] for name, module in model.named_modules()}\n    wanted", "targets"),
    "unread layers off by one": ("bypass.py", "unread", "index % (depth + 1) for index", "index % depth for index", "targets"),
    "first of the layers that are read": ("bypass.py", "unread", "read = max(index", "read = min(index", "targets"),
    "adapter on an empty weight": ("bases.py", "objection", " if 0 in shape else None", " if False else None", "targets"),
    "check: resized buffers": ("check/runs.py", "unchanged.rewind", "tensor.resize_(value.shape)", "pass", "check"),
    "check: an uncalled layer that merging moves": ("check/merging.py", "_find_moved", "problem in (None, UNCALLED)", "problem is None", "check"),
    "poolers taken for targets": ("targets.py", "_left_out", "reasons |= poolers(module)", "pass", "targets"),
    "poolers that are read left out": ("bypass.py", "poolers", ' and "seq_relationship" not in parts', "", "targets"),
    "targets under no_grad": ("bypass.py", "unread", "if _without_gradient(type(module).forward):", "if False:", "targets"),
    "choices of tokens as targets": ("bypass.py", "idle", 'if kind.endswith("Indexer"):', "if False:", "targets"),
    "idle parts as targets": ("targets.py", "_left_out", "reasons = idle(model)", "reasons = {}", "targets"),
    "names that end others' names": ("peft_targets.py", "saved_names", "PREFIX + n if any(o.endswith(n) for o in others) else n", "n", "peft_targets"),
    "names behind PEFT's prefix": ("peft_config.py", "Config.__init__", "name.removeprefix(PREFIX)", "name", "peft_targets"),
    "check: magnified rounding is a bypass": ("check/merging.py", "_merges", "if bound < moved < _SMALL:", "if False:", "check"),
    "check: every small move is rounding": ("check/merging.py", "_merges", "bound = 4 * _distance(apart, rounded)", "bound = _SMALL", "check"),
    "check: reversible layers": ("check/runs.py", "_count", "not torch.is_grad_enabled() and _in_function()", "False", "check"),
    "modes do not see the op": (DISPATCH, "_is_unseen", "        and not _len_torch_dispatch_stack()\n", "", "ops_checks"),
    "profilers do not see the op": (DISPATCH, "_is_unseen", "        and not profiler._is_profiler_enabled\n", "", "ops_checks"),
    "transforms do not see the backward op": (DISPATCH, "_is_unseen", "        and not _are_functorch_transforms_active()\n", "", "transforms"),
    "subclasses do not see the op": (DISPATCH, "_is_unseen", "_PLAIN_TYPES.issuperset(map(type, args))", "True", "ops_checks"),
    "tensors without values computed": (DISPATCH, "_is_unseen", "        and not args[0].is_meta\n", "", "ops_checks"),
    "lora_add_ changes base_out unnoticed": (DISPATCH, "call_in_place", "            increment_version(args[0])\n", "            pass\n", "ops_checks"),
    "unread arguments of a backward missing": ("_contract.py", "Op.given", "if not self.is_backward or all(", "if True or all(", "ops_checks"),
    "plans: cublas where nothing is proven": (CHOICE, "_choose", "if demand is None:", "if False:", "triton_backend"),
    "plans: proven whatever the dtype": (TABLES, "nearest", "proof(plan, call.dtype, call.dropout, call.weight) in table[\"proven\"]", "plan in [entry[\"plan\"] for entry in table[\"proven\"]]", "plans"),
    "plans: unknown fields of a tile": (PLAN, "Launch.check", "if name not in legal:", "if False:", "plans"),
    "plans: tiles of another op's launches": (PLAN, "Plan.launches", "for op in ops if", "for op in OPS if", "plans"),
    "plans: a shared pass timed twice": (CHOICE, "candidates", "serving in listed or", "False or", "plans"),
    "plans: lora_add asks for forward": ("backends/cuda/__init__.py", "_add", '_planned("add",', '_planned("forward",', "plans"),
    "a refusal of a forced backend falls back": ("backends/__init__.py", "serving", "if reason is not None and choice.demand is not None:", "if False:", "native"),
    "ninja beside Python unseen": ("doctor.py", "_ninja", 'sysconfig.get_path("scripts")', '""', "build::test_doctor_shows_ninja"),
    "another ninja unseen": ("doctor.py", "_ninja", 'os.environ.get("NINJA") or "ninja"', '"ninja"', "build::test_doctor_shows_ninja"),
    "other names of targets unknown": ("targets.py", "find_targets", "if wanted and not wanted.match(*places[module]):", "if wanted and not wanted.match(name):", "convert::test_every_name_of_a_shared_module_reaches_it"),
    "other names of targets refused": ("targets.py", "find_targets", "chain.from_iterable(places[module] for module in linear.values()),", "linear,", "convert::test_every_name_of_a_shared_module_reaches_it"),
    "other names of what is excluded unknown": ("targets.py", "find_targets", "if excluded.match(*places[module]):", "if excluded.match(name):", "convert::test_every_name_of_a_shared_module_excludes_saves_and_sets_it"),
    "other names of what is saved unknown": ("targets.py", "find_saved", "patterns.match(*n)}", "patterns.match(n[0])}", "convert::test_every_name_of_a_shared_module_excludes_saves_and_sets_it"),
    "other names in patterns unknown": ("convert.py", "_apply", "all_of = {name: places[linear] for", "all_of = {name: [name] for", "convert::test_every_name_of_a_shared_module_excludes_saves_and_sets_it"),
    "only a first name in patterns": ("options.py", "of_layer", "any(_matches(pattern, name) for name in names)", "_matches(pattern, next(iter(names)))", "convert::test_every_name_of_a_shared_module_excludes_saves_and_sets_it"),
    "names of shared layers folded": ("convert.py", "LoraReport.__str__", "limit=8, fold=False", "limit=8", "convert::test_report"),
    "a module is walked in one place": ("names.py", "keyed_modules", "            seen.remove(module)\n", "            pass\n", "convert::test_a_module_within_itself_is_walked_once"),
    "other names unknown to layers_to_transform": ("convert.py", "_given", "in names.named_modules(model, remove_duplicate=False)]", "in names.named_modules(model)]", "options::test_layers_to_transform_by_any_name"),
    "trained heads missing in silence": ("checkpoint.py", "_say", "    if kept:\n", "    if False:\n", "heads::test_a_trained_head_that_the_file_lacks_is_named"),
    "trained heads of the file warned of": ("checkpoint.py", "_say", " if one.tensor not in read]", "]", "heads::test_a_head_that_the_file_holds_is_loaded_in_silence"),
    "new heads missing in silence": ("checkpoint.py", "_say", "    if fresh:\n", "    if False:\n", "heads::test_a_new_head_that_the_file_lacks_is_named"),
    "new heads of the file warned of": ("checkpoint.py", "_say", "for one in (*saved, *kept))", "for one in kept)", "heads::test_a_head_that_the_file_holds_is_loaded_in_silence"),
    "trained heads named twice": ("checkpoint.py", "_say", "for one in (*saved, *kept))", "for one in saved)", "heads::test_a_trained_head_that_the_file_lacks_is_named"),
    "heads of built models warned of": ("targets.py", "unloaded_heads", "if loaded else []", "if True else []", "heads::test_a_new_head_that_the_file_lacks_is_named"),
    "trained heads of the config named twice": ("checkpoint.py", "_say", "for name in (*saved, *kept) for place", "for name in saved for place", "heads::test_a_tensor_of_a_head_that_the_file_lacks_is_named"),
    "torch.fx cannot trace a layer": ("nn/layer.py", None, 'torch.fx.wrap("lora_linear")\n', "", "surgery::test_torch_fx_writes_an_adapted_layer_as_one_call"),
    "copies of disabled layers stay so": ("nn/layer.py", "LoRALayer.__getstate__", '"_disabled": False', '"_disabled": self._disabled', "convert::test_copies_made_while_disabled_act"),
    "copies of disabled computed factors stay so": ("nn/layer.py", "LoRALayer.__deepcopy__", "LoRALayer.__getstate__(self)", "vars(self)", "convert::test_copies_of_a_tie_and_of_computed_factors_made_while_disabled"),
    "copies of disabled heads hold the base": ("adapters.py", "_state_of_copy", "state[kind][name] = stand_in", "pass", "convert::test_copies_made_while_disabled_act"),
    "copies of disabled heads lose their base": ("adapters.py", "_state_of_copy", 'state["_buffers"][_BASE + name] = original.detach()', "pass", "convert::test_copies_made_while_disabled_act"),
    "copies of disabled ties are untied": ("adapters.py", "swap_saved", "[saved.attribute] = trained", "[saved.attribute] = copy.copy(trained)", "convert::test_copies_of_a_tie_and_of_computed_factors_made_while_disabled"),
    "the state of copies outlives the context": ("adapters.py", "_end_swap", "if not held.get(_SWAPPED):", "if False:", "convert::test_copies_made_while_disabled_act"),
    "from_linear freezes for good": ("nn/layer.py", "LoRALayer.from_linear", "note_frozen(layer, trainable)", "pass", "convert::test_what_an_adapter_froze_trains_again"),
    "to_linear freezes for good": ("nn/layer.py", "LoRALayer.move_out", "thaw(self)", "pass", "convert::test_what_an_adapter_froze_trains_again"),
}  # fmt: skip


def definitions(tree, prefix=""):
    """(qualified name, first line, last line) of every function and class."""
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{prefix}{node.name}."
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield inner[:-1], first, node.end_lineno
        yield from definitions(node, inner)


def source_of(file):
    return (ROOT if file.startswith("csrc/") else PACKAGE) / file


def places(code, where, text):
    """Where the text begins in a definition of a Python source, or (None) outside of all."""
    lines = [0, *accumulate(map(len, code.splitlines(keepends=True)))]
    known = [(n, lines[first - 1], lines[last]) for n, first, last in definitions(ast.parse(code))]
    for match in re.finditer(re.escape(text), code):
        names = {n for n, first, last in known if first <= match.start() and match.end() <= last}
        if where in names if where else not names:
            yield match.start()


def mutated(file, *change):
    """The source with the change (where, old, new) made; SystemExit unless old is there once."""
    *where, old, new = change
    code = source_of(file).read_text()
    if file.endswith(".py"):
        (where,) = where
        found = list(places(code, where, old))
    else:
        found = [match.start() for match in re.finditer(re.escape(old), code)]
    if len(found) != 1:
        raise SystemExit(f"{file}: {where}: {len(found)} occurrences of {old!r}, expected one")
    return code[: found[0]] + new + code[found[0] + len(old) :]


class Extension:
    """Builds the CPU extension with one file changed, in one folder, so that only what depends on
    the file is compiled again."""

    def __init__(self):
        self._lock, self._folder = threading.Lock(), None

    def build(self, file, code, to):
        with self._lock:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory()
                shutil.copytree(ROOT / "csrc", f"{self._folder.name}/csrc")
                (pathlib.Path(self._folder.name) / "lora_kernels").mkdir()
                shutil.copy(ROOT / "setup.py", self._folder.name)
            folder = pathlib.Path(self._folder.name)
            (folder / file).write_text(code)
            only = {"LORA_KERNELS_BUILD_CPU": "1", "LORA_KERNELS_BUILD_CUDA": "0"}
            result = subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
                cwd=folder, env=os.environ | only, capture_output=True, text=True,
            )  # fmt: skip
            shutil.copy(source_of(file), folder / file)
            if result.returncode:
                raise SystemExit(result.stdout + result.stderr)
            shutil.copy(*folder.glob("lora_kernels/*.so"), to)


EXTENSION = Extension()


def pytest_of(test):
    """(what pytest is to run, environment) of "name" or "name::test", of test_name.py. What runs
    in Triton's interpreter does so at once, not in a child, so that it stops at the first failure.
    """
    interpreted = {"TRITON_INTERPRET": "1", "LORA_KERNELS_BACKEND": "triton"}
    file, *inner = test.split("::")
    [path] = TESTS.rglob(f"test_{file}.py")
    return "::".join([str(path), *inner]), interpreted if file.startswith("interpreted_") else {}


def killed_by(mutant):
    """The test that fails on the mutant, or None."""
    file, *change, tests = mutant
    code = mutated(file, *change)
    native = file.startswith("backends/native") or "few_rows" in tests or "native." in change[1]
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "lora_kernels"
        # The compiled kernels come along only where they are meant: they would serve most calls.
        left = shutil.ignore_patterns("__pycache__", *([] if native else ["*.so"]))
        shutil.copytree(PACKAGE, copy, ignore=left)
        if file.startswith("csrc/"):
            EXTENSION.build(file, code, copy)
        else:
            (copy / file).write_text(code)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [f"--rootdir={ROOT}", f"--confcutdir={TESTS}"]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        for test in tests.split():
            path, more = pytest_of(test)
            result = subprocess.run(
                [*command, path], cwd=folder, env=environment | more, capture_output=True, text=True
            )
            failed = re.findall(r"^FAILED \S*?::(.*?)(?: - .*)?$", result.stdout, re.MULTILINE)
            if result.returncode == 1 and failed:
                return failed[0]
            if result.returncode < 0:  # a signal: memory that is not there
                return f"{test} ended by signal {-result.returncode}"
            if result.returncode:
                raise SystemExit(result.stdout + result.stderr)
    return None


def main():
    chosen = [
        name for name in MUTANTS if not sys.argv[1:] or any(word in name for word in sys.argv[1:])
    ]
    survivors = 0
    with ThreadPoolExecutor(PROCESSES) as pool:
        killers = pool.map(killed_by, map(MUTANTS.get, chosen))
        for name, killer in zip(chosen, killers, strict=True):
            survivors += killer is None
            print(f"{'killed  ' if killer else 'SURVIVED'}  {name:45} {killer or ''}", flush=True)
    print(f"{len(chosen)} tried, {survivors} survived")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
