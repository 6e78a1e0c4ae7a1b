"""Breaks the package in one place at a time and reports which mutants the tests kill.

python tests/mutants.py [word of a name ...]     exit status 1 if a mutant survives
"""

# ruff: noqa: E501

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

TESTS = pathlib.Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "lora_kernels"
OPS, VMAP, FUNCTIONAL, DROPOUT, BLOCKED, REFERENCE = (
    "_ops.py",
    "_vmap.py",
    "functional.py",
    "backends/dropout.py",
    "backends/blocked.py",
    "backends/reference.py",
)
TRITON = "backends/triton/"
INTEGRATION = "integrations/peft.py"
KERNELS = "triton_interpreter"

# name: (file, text that occurs once, what replaces it, test files that should notice)
MUTANTS = {
    "sign of ds": (REFERENCE, "if rank_first else b, scaling)", "if rank_first else b, -scaling)", "ops"),
    "scaling dropped in s": (REFERENCE, "s = _scaled_product(x, _as(lora_a, x).t(), scaling)\n        y = _base", "s = _scaled_product(x, _as(lora_a, x).t(), 1)\n        y = _base", "ops"),
    "scaling dropped in s of lora_add": (REFERENCE, "s = _scaled_product(x, _as(lora_a, x).t(), scaling)\n    y.addmm_", "s = _scaled_product(x, _as(lora_a, x).t(), 1)\n    y.addmm_", "ops"),
    "scaling dropped in ds": (REFERENCE, "if rank_first else b, scaling)", "if rank_first else b, 1.0)", "ops"),
    "scaling dropped in blocked ds": (BLOCKED, "_scaled(rows, b, scaling)", "_scaled(rows, b, 1.0)", "ops"),
    "1/(1-p) missing in s": (BLOCKED, "scaling * keep_scale(dropout_p)", "scaling", "dropout"),
    "1/(1-p) missing in backward": (BLOCKED, "scale = keep_scale(dropout_p) if dropout_p else 1.0", "scale = 1.0", "dropout"),
    "1/(1-p) missing in dA": (BLOCKED, "dropped.to(total), alpha=scale)", "dropped.to(total))", "ops"),
    "mask not applied in dx": (BLOCKED, "term.masked_fill_(~keep[:, columns], 0)", "term", "dropout"),
    "mask not applied in dA": (BLOCKED, "x[block] if keep is None else x[block].masked_fill(~keep, 0)", "x[block]", "ops"),
    "swapped dA and dB": (REFERENCE, "    return dx, dweight, d_a, d_b\n", "    return dx, dweight, d_b, d_a\n", "ops"),
    "swapped A and B in backward": (OPS, "dy, x, lora_a, lora_b, s, mask, ctx.scaling", "dy, x, lora_b, lora_a, s, mask, ctx.scaling", "ops"),
    "wrong dtype of dA": (REFERENCE, "_as(torch.mm(ds.t(), x), lora_a)", "torch.mm(ds.t(), x)", "ops accuracy"),
    "wrong dtype of blocked dA": (BLOCKED, "d_a.to(lora_a.dtype)", "d_a.to(dy.dtype)", "ops accuracy"),
    "s rounded twice": (REFERENCE, "return torch.addmm(unread, rows, matrix, beta=0, alpha=scaling)", "return (rows @ matrix).mul_(scaling)", "accuracy"),
    "s rounded twice in blocks": (BLOCKED, "return torch.addmm(rows.new_zeros(()), rows, matrix, beta=0, alpha=scale)", "return (rows @ matrix) * scale", "accuracy"),
    "bias rounded on its own": (BLOCKED, "torch.addmm(bias[columns].to(out.dtype).to(rows.dtype), rows, strip)", "torch.mm(rows, strip) + bias[columns].to(out.dtype).to(rows.dtype)", "accuracy"),
    "branch rounded on its own": (REFERENCE, "        y.addmm_(s, _as(lora_b, x).t())\n    return y, s if", "        y += s @ _as(lora_b, x).t()\n    return y, s if", "accuracy"),
    "bias dropped in wide path": (BLOCKED, "if bias is None:", "if True:", "accuracy"),
    "dA summed in 16 bits": (BLOCKED, "return torch.float64 if dtype == torch.float64 else torch.float32", "return dtype", "accuracy"),
    "philox rounds 6": (DROPOUT, "ROUNDS = 7", "ROUNDS = 6", "dropout"),
    "philox key halves swapped": (DROPOUT, "k0, k1 = seed & _LOW, (seed >> 32) & _LOW", "k1, k0 = seed & _LOW, (seed >> 32) & _LOW", "dropout"),
    "threshold off by one": (DROPOUT, ">= threshold(p) - 32768", "> threshold(p) - 32768", "dropout"),
    "truncated threshold": (DROPOUT, "round(65536 * p)", "int(65536 * p)", "dropout"),
    "high half first": (DROPOUT, "halves = words.to(torch.int32).view(torch.int16)", "halves = words.to(torch.int32).view(torch.int16).unflatten(-1, (-1, 2)).flip(-1)", "dropout"),
    "signed comparison": (DROPOUT, "(halves ^ -32768)", "halves", "dropout"),
    "block offset dropped forward": (BLOCKED, "keep_mask(seed, block.start, *rows.shape", "keep_mask(seed, 0, *rows.shape", "dropout"),
    "block offset dropped backward": (BLOCKED, "keep_mask(seed, block.start, len(rows)", "keep_mask(seed, 0, len(rows)", "dropout"),
    "blocks overlap the last row": (BLOCKED, "range(0, count, step)", "range(0, count - 1, step)", "accuracy"),
    "double-backward formula removed": (OPS, '    "lora_linear_backward": _Once,\n', "", "ops"),
    "double-backward formula of lora_add removed": (OPS, '    "lora_add_backward": _Once,\n', "", "ops"),
    "mark_non_differentiable removed": (OPS, "    ctx.mark_non_differentiable(*output[1:])\n", "", "ops"),
    "save flag inverted": (REFERENCE, "        y.addmm_(s, _as(lora_b, x).t())\n    return y, s if save_s", "        y.addmm_(s, _as(lora_b, x).t())\n    return y, s if not save_s", "ops"),
    "x always saved": (OPS, "x if need_input else None", "x", "ops"),
    "gradients computed unasked": (REFERENCE, "    if need_weight:\n        dweight = _as(", "    if True:\n        dweight = _as(", "ops"),
    "lora_add works in place": (REFERENCE, "base_out.clone(memory_format=torch.contiguous_format)", "base_out", "ops"),
    "uninitialised sum": (BLOCKED, "dy.new_zeros(r, N, dtype=total)", "dy.new_empty(r, N, dtype=total)", "ops"),
    "forward mode not refused": (OPS, "if forward_ad._current_level < 0:", "if True:", "ops"),
    "flops without the branch": ("_flops.py", "(K * N + r * (K + N))", "K * N", "ops"),
    "flops never registered": ("_flops.py", "sys.meta_path.insert(0, _Finder())", "pass", "import"),
    "dual tensors not refused": (OPS, "        refuse_forward_mode(args)\n        return _FUNCTIONS", "        return _FUNCTIONS", "ops"),
    "jvp not refused": (OPS, "        refuse_forward_mode(args)\n        if not (", "        if not (", "transforms"),
    "no graph below a level of grad": (OPS, "with torch.enable_grad(), forward_ad", "with forward_ad", "transforms"),
    "no tangents below a level of grad": (OPS, "forward_ad._set_fwd_grad_enabled(True):", "forward_ad._set_fwd_grad_enabled(False):", "transforms"),
    "dropout folded by vmap": (VMAP, "return args[dropout_p] == 0 and ", "return ", "transforms"),
    "dA folded by vmap": (VMAP, " and not any(args[len(args) - flags :])", "", "transforms"),
    "batched adapter folded by vmap": (VMAP, " and batched.issubset(rows)", "", "transforms"),
    "lora_add_ onto one base by vmap": (VMAP, "and in_dims[0] is None", "and False", "transforms"),
    "Conv1D read as a Linear": ("layer.py", "return weight.t() if self.fan_in_fan_out else weight", "return weight", "integrations_transformers"),
    "Conv1D merged transposed": ("layer.py", "_add_product(self.matrix, self.lora_B, self.lora_A, self.scaling)\n        if not keep_base", "_add_product(self.weight, self.lora_B, self.lora_A, self.scaling)\n        if not keep_base", "integrations_transformers"),
    "fan_in_fan_out not written": ("checkpoint.py", "any(layer.fan_in_fan_out for layer in layers.values())", "False", "integrations_transformers"),
    "buffers of modules_to_save left out": ("adapters.py", "found = {**module._parameters, **module._buffers}", "found = {**module._parameters}", "checkpoint"),
    "merged state without its base": ("state.py", "        if self._base_weight_cpu is not None:  # no", "        if False:  # no", "nn"),
    "a merged state taken for a base": ("state.py", "        if base is not None:\n", "        if False:\n", "nn"),
    "a plain weight not merged again": ("state.py", "        elif again:\n", "        elif False:\n", "nn"),
    "a final merge outlives a new base": ("state.py", '        elif base is not None or "weight" in given:', "        elif base is not None:", "nn"),
    "a state that does not fit half loaded": ("state.py", "            error_msgs += errors\n            return", "            error_msgs += errors", "nn"),
    "an adapter for a base that is gone": ("state.py", 'if self._merged == "final" and adapter and', "if False and adapter and", "nn"),
    "the caller's tensors merged into": ("state.py", 'state[prefix + "weight"] = given["weight"].clone()', "pass", "nn"),
    "merged_state_dict of untrained values": ("merged.py", "return whole(saved.trained)", "return whole(saved.base)", "merged"),
    "merged_state_dict without the adapter": ("merged.py", 'isinstance(module, LoRALayer) and attribute == "weight":', "False:", "merged"),
    "merged_state_dict of a tied weight": ("merged.py", '    require_untied(model, layers, "merged_state_dict")\n', "", "merged"),
    "merged twice in merged_state_dict": ("layer.py", "        if self._merged:\n            return self.weight.detach()\n", "", "merged"),
    "wrappers in names": ("names.py", "        return \"module\"\n", "        return None\n", "names"),
    "compiled blocks in names": ("names.py", "    for (home, kind), attribute in {**_ELSEWHERE, **_HIDDEN}.items():", "    for (home, kind), attribute in _HIDDEN.items():", "names"),
    "checkpointed blocks in names of states": ("names.py", "            if attribute not in _HIDDEN.values():\n", "            if True:\n", "names"),
    "one's own module taken for a wrapper": ("names.py", "    if isinstance(module, _PARALLEL):", '    if "module" in module._modules:', "names"),
    "what trains and is not saved not said": ("checkpoint.py", "    _warn_of_unsaved(model)\n", "", "names"),
    "frozen parameters said to be left out": ("checkpoint.py", "parameter is not None and parameter.requires_grad and parameter not in saved", "parameter is not None and parameter not in saved", "names"),
    "shared experts as PEFT's fused ones": ("peft_targets.py", "    return [name for name in layers if name.rpartition", "    return [name for name in () if name.rpartition", "peft_targets"),
    "patterns of parameters without .weight": ("checkpoint.py", '(r"(\\.weight)?" if name in as_parameters else "")', '""', "peft_targets"),
    "dropout beside target_parameters": ("checkpoint.py", "0.0 if as_parameters else layers[first].dropout", "layers[first].dropout", "peft_targets"),
    "fused experts' adapters not refused": ("checkpoint.py", "    _require_linear_parameters(model, config, directory / CONFIG_NAME)\n", "", "peft_targets"),
    "PEFT's renaming not said": ("peft_targets.py", "    if reason:\n", "    if False:\n", "peft_targets"),
    "a module in two places not said": ("peft_targets.py", "if len(found) > 1]", "if len(found) > 2]", "peft_targets"),
    "inner models without a guard": ("checkpoint.py", "    for module in model.modules():\n        save =", "    for module in (model,):\n        save =", "save_pretrained"),
    "a copy saves the original": ("checkpoint.py", "functools.partial(_save_pretrained, module)", "lambda *a, **k: _save_pretrained(module, *a, **k)", "save_pretrained"),
    "guards of inner models left behind": ("checkpoint.py", "    for module in model.modules():\n        guard =", "    for module in (model,):\n        guard =", "save_pretrained"),
    "every save_pretrained guarded": ("checkpoint.py", 'if callable(save) and "save_directory" in inspect.signature(save).parameters:', "if callable(save):", "save_pretrained"),
    "the sum saved as the base": ("checkpoint.py", "        if base is not None and base.numel():\n", "        if False:\n", "save_pretrained"),
    "compiled names in a saved base": ("checkpoint.py", "state[names.join(plain.get(owner, owner), attribute)] = tensor", "state[key] = tensor", "save_pretrained"),
    "unmerged layers lost beside a final one": ("checkpoint.py", "    if parts:\n", "    if len(parts) == len(layers):\n", "save_pretrained"),
    "a failed rename not undone": ("files.py", "for path in renamed:", "for path in ():", "checkpoint"),
    "files of two saves taken for one": ("checkpoint.py", "for key, value in paired.items():", "for key, value in ():", "checkpoint"),
    "PEFT's layers taken for targets": ("targets.py", "    require_no_peft(model)\n    for name", "    for name", "checkpoint"),
    "an interrupted apply_lora not undone": ("adapters.py", "        before.restore()\n", "        pass\n", "all_or_nothing"),
    "classes not brought back": ("adapters.py", "            module.__class__ = kind\n", "", "all_or_nothing"),
    "what modules hold not brought back": ("adapters.py", "                held[key].update(content)\n", "", "all_or_nothing"),
    "flags not brought back": ("adapters.py", "            parameter.requires_grad_(flag)\n", "            pass\n", "all_or_nothing"),
    "PiSSA's weights not kept": ("convert.py", "                before.keep(linear.weight)\n", "", "all_or_nothing"),
    "adapters not kept while loading": ("checkpoint.py", "                before.keep(layer.lora_B)\n", "", "all_or_nothing"),
    "saved modules not kept while loading": ("checkpoint.py", "            before.keep(target)\n", "", "all_or_nothing"),
    "marks of an earlier call changed": ("adapters.py", "module.__dict__[_FROZEN] = module.__dict__.get(_FROZEN, set()) | frozen", "module.__dict__.setdefault(_FROZEN, set()).update(frozen)", "all_or_nothing convert"),
    "alpha kept as it was given": ("options.py", "return int(value) if isinstance(value, numbers.Integral) else float(value)", "return value", "options"),
    "a bool taken for a number": ("options.py", "if isinstance(number, bool) or not", "if not", "options nn"),
    "alpha of zero": ("options.py", "    if value <= 0:", "    if value < 0:", "nn"),
    "the last pattern wins": ("options.py", "in (patterns or {}).items():\n        if _matches", "in reversed((patterns or {}).items()):\n        if _matches", "options"),
    "patterns without a target taken": ("options.py", "        if not found:\n", "        if False:\n", "options"),
    "options of PEFT dropped": ("options.py", "        if value and value != field.default:", "        if False:", "options"),
    "layers_to_transform dropped": ("options.py", "if config.layers_to_transform not in (None, []):", "if False:", "options"),
    "PEFT's heads dropped": ("options.py", "dict.fromkeys((*(config.modules_to_save or ()), *heads))", "dict.fromkeys(config.modules_to_save or ())", "options"),
    "init_lora_weights=False dropped": ("options.py", 'False: "random"', 'False: "kaiming"', "options"),
    "new heads adapted": ("targets.py", "            heads[name] = module\n", "            pass\n", "heads"),
    "loaded heads taken for new": ("targets.py", 'return getattr(parameter, "_is_hf_initialized", False)', "return False", "heads"),
    "an excluded head trained": ("targets.py", "if excluded.match(name) or (inside", "if False and (inside", "heads"),
    "a named head trained in full": ("targets.py", "elif not wanted.is_for(name, inside, names - inside):", "else:", "heads"),
    "a head loaded in part adapted": ("targets.py", "_is_new(c, all if body is None else any)", "_is_new(c, all)", "heads"),
    "parts of a head written one by one": ("adapters.py", "            inside.update(module.modules())\n", "", "heads"),
    "biases of experts listed": ("targets.py", "    if not matrix or vectors or _ELEMENTWISE.search(attribute):", "    if not matrix:", "convert"),
    "vectors of experts listed": ("targets.py", "not matrix or vectors or", "not matrix or", "convert"),
    "experts matched in silence": ("targets.py", "lambda predicate: _what_else(model, predicate)", "lambda predicate: None", "convert"),
    "what is trained in full said to be frozen": ("targets.py", "if is_linear(module) or module in trained:", "if is_linear(module):", "convert"),
    "skipped layers not folded": ("convert.py", "reasons.setdefault(reason, []).append(name)", "reasons.setdefault(reason + name, []).append(name)", "convert"),
    "lazy layers not refused": ("targets.py", "if is_lazy(parameter):", "if False:", "options"),
    "16-bit adapters by default": ("layer.py", "torch.float32 if self.weight.dtype in _HALVES else self.weight.dtype", "self.weight.dtype", "nn"),
    "weights without values merged": ("layer.py", "            if tensor.is_meta:\n", "            if False:\n", "weights"),
    "subclasses taken for weights": ("layer.py", "    if decides and not is_sharded", "    if False and not is_sharded", "weights"),
    "odd dtypes taken for weights": ("layer.py", "if tensor.dtype not in _DTYPES:", "if False:", "weights"),
    "computed tensors taken for parameters": ("layer.py", "if name in module._parameters or name in module._buffers:", "if hasattr(module, name):", "weights"),
    "pruned factor as of the last forward": ("layer.py", "return hook.apply_mask(self)", "return getattr(self, name)", "weights"),
    "offloaded adapter not read": ("layer.py", "hook = module._hf_hook if is_offloaded(module) else None", "hook = None", "weights"),
    "half a merge kept": ("layer.py", "                self.weight.copy_(self._kept_base())\n            self.merged_base", "                pass\n            self.merged_base", "weights"),
    "merges before an error kept": ("convert.py", "            for name in done:\n                layers[name].unmerge()", "            pass", "weights"),
    "ties by memory not seen": ("targets.py", "for one, other in _overlaps(found):", "for one, other in ():", "weights"),
    "columns of one matrix taken for tied": ("targets.py", "return bool(second.any())", "return True", "weights"),
    "head with an adapter replaced": ("adapters.py", "    _guard_embeddings(model)\n", "", "weights"),
    "same size taken for a resize": ("adapters.py", "new_num_tokens in (None, size)", "new_num_tokens is None", "weights"),
    "fixed seed": (FUNCTIONAL, "torch.randint(2**63 - 1, (), dtype", "torch.randint(1, (), dtype", "dropout"),
    "autocast inside the op": (OPS, "if torch.is_autocast_enabled(device):", "if False:", "functional"),
    "lora_add_ in grad mode": (FUNCTIONAL, "if torch.is_grad_enabled() and any(", "if False and any(", "functional"),
    "bias dropped with few rows": (REFERENCE, "torch.addmm(bias[:, None], weight, x_t)", "torch.mm(weight, x_t)", "ops accuracy"),
    "op past autograd keeps no graph": (OPS, "return _FUNCTIONS[name].apply(op, None, *args)", "return _below_autograd(op, None, args)[0]", "ops"),
    "raw op unchecked": (OPS, "            check(args)\n", "            pass\n", "ops_checks"),
    "fake unchecked": (OPS, "        _CHECKS[name](args)\n", "", "ops_checks"),
    "raw op takes rank 0": ("_checks.py", 'if 0 in (sizes["N"], sizes["K"], sizes["r"]):', "if False:", "ops_checks"),
    "unread s refused": ("_checks.py", "not _is_read(key, names, args)", "False", "ops_checks"),
    "sharded masks start at column 0": ("backends/sharded.py", "return torch.cat([seed.reshape(1), *offsets])", "return seed", "distributed"),
    "sharded part of a sum counted twice": ("backends/sharded.py", "return local if first else torch.zeros_like(local)", "return local", "distributed"),
    "whole dropped copy": (BLOCKED, "return max(1, budget // (4 * width))", "return 1 << 40", "ops"),
    "triton: scale dropped in s": (TRITON + "low_rank.py", "store_tile(out, acc * scale, rank, rows, 1, r, r, M)", "store_tile(out, acc, rank, rows, 1, r, r, M)", KERNELS),
    "triton: scaling dropped in ds": (TRITON + "gradients.py", "(part_ds, ds, scaling)", "(part_ds, ds, 1.0)", KERNELS),
    "triton: a row tile missing in dB": (TRITON + "gradients.py", "part_db += tile.to(tl.int64) * N * r", "part_db += 0 * tile.to(tl.int64)", KERNELS),
    "triton: mask not applied in dx": (TRITON + "blocks.py", "tl.where(keep, term * scale, 0.0)", "term * scale", KERNELS),
    "triton: mask not applied in dA": (TRITON + "gradients.py", "tl.where(keep_tile(seed, rows, col, threshold, BC), tile, 0.0)", "tile", KERNELS),
    "triton: place in the mask ignored": (TRITON + "blocks.py", "rows = row_0 + rows", "rows = rows + 0 * row_0", KERNELS),
    "triton: last column of the reduction lost": (TRITON + "gemm.py", "x_values = tl.load(x_tile, mask=ks[None, :] < left,", "x_values = tl.load(x_tile, mask=ks[None, :] < left - 1,", KERNELS),
    "triton: last partial sum lost": (TRITON + "reduce.py", "(index[:, None] < count)", "(index[:, None] < count - 1)", KERNELS),
    "triton: bias added after a strip": (TRITON + "gemm.py", "acc += values.to(out.dtype.element_ty).to(tl.float32)[None, :]", "acc += values.to(tl.float32)[None, :] * (col < BN)", KERNELS),
    "triton: s of the flag kernel unscaled": (TRITON + "flag.py", "store_tile(s, low * scale,", "store_tile(s, low,", KERNELS),
    "triton: a share of the rows missing in grouped dA": (TRITON + "grouped.py", "columns * ranks * SPLIT:", "columns * ranks * SPLIT - 1:", KERNELS),
    "triton: 1/(1-p) missing in grouped dA": (TRITON + "grouped.py", "reduce_partials((part, out, scale))", "reduce_partials((part, out, 1.0))", KERNELS),
    "triton: alignment not in the key": (TRITON + "launch.py", "key.append(arg.data_ptr() % 16)", "pass", "triton_launch"),
    "triton: partial sums freed too early": (TRITON + "low_rank.py", "held.append(part)", "pass", "triton_backend"),
    "triton: dy read once more": (TRITON + "tiles.py", "return r < 64 and r <= rank_block(dtype, r)", "return False", KERNELS),
    "tensor scaling dropped": (FUNCTIONAL, "return 1.0, wide * scaling.to(wide.dtype)", "return 1.0, wide", "functional"),
    "tensor scaling folded in 16 bits": (FUNCTIONAL, "wide = lora_b if lora_b.dtype == torch.float64 else lora_b.float()", "wide = lora_b", "functional"),
    "scaling that trains detached": (FUNCTIONAL, "if scaling.requires_grad and torch.is_grad_enabled():", "if False:", "functional"),
    "scaling on another device": (FUNCTIONAL, "if scaling.device != device:", "if False:", "functional"),
    "good case blind to devices": (FUNCTIONAL, "or tensor.device != device:\n            return False", "or False:\n            return False", "functional"),
    "good case blind to autocast": (FUNCTIONAL, "and (x.is_meta or not torch.is_autocast_enabled(device.type))", "", "functional"),
    "fused PEFT: global hooks unseen": (INTEGRATION, "or _has_any_global_hook()", "", "integrations_peft"),
    "fused PEFT: traced": (INTEGRATION, "or torch.jit.is_tracing()", "", "integrations_peft"),
    "fused PEFT: backward hooks unseen": (INTEGRATION, "or module._backward_hooks", "", "integrations_peft"),
    "fused PEFT: backward pre-hooks unseen": (INTEGRATION, "or module._backward_pre_hooks", "", "integrations_peft"),
    "fused PEFT: replaced forward unseen": (INTEGRATION, 'or "forward" in module.__dict__', "", "integrations_peft"),
    "fused PEFT: subclass of a weight taken": (INTEGRATION, "if types is not None and type(parameter) not in _PLAIN:", "if False:", "integrations_peft"),
    "fused PEFT: merged adapters unseen": (INTEGRATION, "or self.merged_adapters", "", "integrations_peft"),
    "fused PEFT: dropout of a few rows": (INTEGRATION, "if dropout.training and type(dropout) is nn.Dropout:", "if False:", "integrations_peft"),
    "fused PEFT: scaling of a few rows": (INTEGRATION, "y = y + branch * self.scaling[name]", "y = y + branch", "integrations_peft"),
    "fused PEFT: few rows compiled": (INTEGRATION, "x.is_cpu and not torch.compiler.is_compiling()", "x.is_cpu", "integrations_peft"),
    "fused PEFT: any scaling tensor taken": (INTEGRATION, "return not isinstance(scaling, Tensor) or (", "return True or (", "integrations_peft"),
    "fused PEFT: lost gradient unnoticed": (INTEGRATION, "if dx is None or not dx.any():", "if False:", "integrations_peft"),
    "fused PEFT: wrong gradient unnoticed": (INTEGRATION, "if linear and not (", "if False and not (", "integrations_peft"),
    "fused PEFT: tried on the base itself": (INTEGRATION, "    base = copy.deepcopy(base)\n", "", "integrations_peft"),
    "fused PEFT: warns in every call": (INTEGRATION, "self.__dict__.pop(_WARNING)", "self.__dict__[_WARNING]", "integrations_peft"),
    "fused PEFT: warns where nothing is lost": (INTEGRATION, "if isinstance(x, Tensor) and x.requires_grad:", "if True:", "integrations_peft"),
    "fused PEFT: own name in repr": (INTEGRATION, "return self.peft_class.__name__\n", "return type(self).__name__\n", "integrations_peft"),
    "metadata of a weight taken for a use": ("bypass.py", """if inner[-1:] == ("weight",) and asked:""", "if False:", "bypass"),
    "conditions of a read ignored": ("bypass.py", "if value is not _UNKNOWN and bool(value) != outcome:", "if False:", "bypass"),
    "read past only in forward itself": ("bypass.py", "todo.append((*member, 0))", "pass", "bypass"),
    "encoder layers stay on the fast path": ("bypass.py", "setattr(module, option, 0)", "pass", "bypass"),
    "nested tensors for encoders with adapters": ("bypass.py", """    nn.TransformerEncoder: "use_nested_tensor",\n""", "", "bypass"),
    "fast path not given back": ("bypass.py", "setattr(module, option, vars(module).pop(_KEPT + option))", "pass", "bypass"),
    "layers put in by hand stay on the fast path": ("bypass.py", "if isinstance(child, LoRALayer) and isinstance(module", "if False and isinstance(module", "bypass"),
    "bypassed layers named explicitly are skipped": ("targets.py", "elif module in past and wanted:", "elif False:", "bypass"),
    "check: buffers not restored": ("check.py", "if not torch.equal(buffer, value):", "if False:", "check"),
    "check: weights not restored": ("check.py", "parameter.copy_(value)", "pass", "check"),
    "check: optimizers step in the backward": ("check.py", "now.clear()\n    try:", "pass\n    try:", "check"),
    "check: adapters merged as small as they are": ("check.py", "_enlarge(adapter)\n        apart", "pass\n        apart", "check"),
    "check: a zero gradient passes": ("check.py", "if norm == 0 and not explained", "if False", "check"),
    "check: B = 0 taken for a fault": ("check.py", "if norm == 0 and not explained", "if norm == 0", "check"),
    "check: compared in train mode": ("check.py", "if evaluate:", "if False:", "check"),
    "training silent about idle adapters": ("recipes/training.py", "_warn_of_idle_adapters(model, optimizer)\n    scaler", "pass\n    scaler", "check"),
    "training warns at every step": ("recipes/training.py", "first = len(run.history) == begun", "first = True", "check"),
    "tied layer a target by default": ("targets.py", "        if beside:\n", "        if False:\n", "targets"),
    "head of the outermost model only": ("targets.py", "        if isinstance(head, nn.Module):\n", "        if isinstance(head, nn.Module) and module is model:\n", "targets"),
    "new heads of the outermost model only": ("targets.py", "        if module not in inside and isinstance(getattr", "        if module is model and isinstance(getattr", "targets"),
    "wrappers in names of targets": ("targets.py", "for name, module in named_modules(model) if is_linear(module)}\n    wanted", "for name, module in model.named_modules() if is_linear(module)}\n    wanted", "targets"),
    "unread layers off by one": ("bypass.py", "index % (depth + 1) for index", "index % depth for index", "targets"),
    "first of the layers that are read": ("bypass.py", "read = max(index", "read = min(index", "targets"),
    "adapter on an empty weight": ("targets.py", " if 0 in shape else None", " if False else None", "targets"),
    "check: resized buffers": ("check.py", "buffer.resize_(value.shape)", "pass", "check"),
    "check: an uncalled layer that merging moves": ("check.py", "problem in (None, _UNCALLED)", "problem is None", "check"),
}  # fmt: skip


def killed_by(file, old, new, tests):
    """The test that fails on the mutant, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "lora_kernels"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        source = (copy / file).read_text()
        if source.count(old) != 1:
            raise SystemExit(f"{file}: {source.count(old)} occurrences of {old!r}, expected one")
        (copy / file).write_text(source.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [f"--rootdir={TESTS.parent}", f"--confcutdir={TESTS}"]
        files = [str(TESTS / f"test_{test}.py") for test in tests.split()]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        result = subprocess.run(
            command + files, cwd=folder, env=environment, capture_output=True, text=True
        )
        if result.returncode == 0:
            return None
        failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
        if result.returncode != 1 or not failed:
            raise SystemExit(result.stdout + result.stderr)
        return failed[0].split("::")[1].split(" - ")[0]


def main():
    survivors = 0
    for name, mutant in MUTANTS.items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        killer = killed_by(*mutant)
        survivors += killer is None
        print(f"{'killed  ' if killer else 'SURVIVED'}  {name:45} {killer or ''}", flush=True)
    print(f"{survivors} survived")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
