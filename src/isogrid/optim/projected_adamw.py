"""`ProjectedAdamW`: AdamW whose moments live in a subspace of the gradient."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from isogrid.errors import IsogridError, IsogridWarning
from isogrid.fitting.ranks import RankRule, as_rank_rule
from isogrid.optim.bases import Work, fresh_state, side_of
from isogrid.optim.options import checked
from isogrid.optim.plain import Plain, step_plain
from isogrid.optim.required import projects, require_fit, require_usable
from isogrid.optim.sharding import GradientMatrix, is_sharded, local, rows_of
from isogrid.optim.steps import step_projected

# A bucket of one pass on a GPU: enough small tensors to fill a launch, few enough that coordinates stay a small part.
BUCKET = 2**25


class ProjectedAdamW(Optimizer):
    """AdamW in gradient subspaces, with every choice open; the defaults are Isogrid's own method.

    A matrix ``(m, n)`` keeps a basis of r directions and Adam's moments of the gradient's coordinates there:
    ``r (short + 2 long)`` numbers instead of ``2 m n``. Parameters of more dimensions are matrices of ``shape[0]``
    rows. Vectors, and groups with ``rank=None``, get plain AdamW. `isogrid.optim.projected_groups` makes groups of a
    model; `isogrid.optim.galore` and its neighbours make the published methods.

    Every option is an option of a parameter group.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate.
        rank: directions: a number, a fraction of the short side, a rule of `isogrid.fitting.ranks`, or None for AdamW.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decay λ.
        decoupled: decay the weight itself (AdamW); False adds ``λ W`` to the gradient (Adam).
        projector: ``svd`` (exact), ``randomized`` (Gaussian sketch), ``power`` (one warm power iteration a refresh),
            ``random`` (Gaussian, drawn anew from its seed and never stored), ``random_orthonormal``, ``identity``
            (the first coordinates), ``top`` (the largest entries instead of a subspace; ``rank`` is their fraction).
        side: ``auto`` (the short side), ``left``, ``right``, ``both``, ``min_state`` (the long side).
        refresh: steps between new bases.
        adaptive: let the gap grow while the leading direction stays: ``{"threshold", "factor", "queue"}``, or None.
        oversample: extra columns of the sketch.
        power_steps: rounds of subspace iteration on the sketch.
        sketch_factor: columns of the sketch are ``sketch_factor · r + oversample``.
        tracking: share of the momentum in what the projector ``power`` follows.
        transition: of the moments at a refresh: ``keep``, ``reset`` or ``reproject``.
        residual: what the rest of the gradient does: ``none``, ``normalized`` (the default: channels of unit size, the
            residual damped as the momentum damps the subspace), ``fira``, ``error_feedback``,
            ``apollo_channel``, ``apollo_tensor``.
        scale: α, a factor of the subspace's update (under APOLLO its root scales the whole).
        limiter: the largest growth of a residual's norm per step, None for no limit.
        residual_of_scaled: Fira's published code instead of its paper, where ``scale`` is not 1.
        scale_first: APOLLO's ``scale_front``.
        core: ``adam``, or ``sgd`` without momentum.
        style: ``torch``, or ``hf``: decay after the step, eps before the bias correction.
        correct_bias: only under ``hf``.
        state: precision of moments, basis and error: ``float32`` (float64 for float64 parameters), ``bfloat16``,
            ``8bit`` (moments and error of at least 4,096 numbers in whole blocks of 256).
        projector_bits: 4 or 8 for a quantised basis, or None.
        stochastic_rounding: of bfloat16 weights.
        seed: of sketches and random bases, with the parameter's place and the refresh's number.
        foreach: group small operations of many parameters; None does so on GPUs.
        in_backward: step each parameter as soon as its gradient is there and free it: see `step`.

    Raises:
        IsogridError: no parameters, a value out of range, choices that contradict each other, or a rank beyond a
            parameter's shape.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: RankRule | int | float | dict[str, Any] | None = 16,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        projector: str = "randomized",
        side: str = "auto",
        refresh: int = 200,
        adaptive: dict[str, float] | None = None,
        oversample: int = 4,
        power_steps: int = 0,
        sketch_factor: int = 1,
        tracking: float = 0.0,
        transition: str = "reproject",
        residual: str = "normalized",
        scale: float = 1.0,
        limiter: float | None = None,
        residual_of_scaled: bool = False,
        scale_first: bool = False,
        core: str = "adam",
        style: str = "torch",
        correct_bias: bool = True,
        state: str = "float32",
        projector_bits: int | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        foreach: bool | None = None,
        in_backward: bool = False,
    ) -> None:
        options = dict(locals())
        defaults = {key: options[key] for key in options if key not in ("self", "params", "in_backward", "__class__")}
        params = list(params)
        # A tensor alone is a group of one, as in torch, and has no truth of its own.
        held = [group.get("params", True) if isinstance(group, dict) else True for group in params]
        if all(not isinstance(one, Tensor) and not one for one in held):
            raise IsogridError("ProjectedAdamW: there are no parameters to optimize; give model.named_parameters()")
        self._stepped: set[int] = set()
        self._handles: list[Any] = []
        super().__init__(params, defaults)
        self.in_backward = in_backward
        if in_backward:
            self._register_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_handles"):  # a copy has no hooks of its own: they belong to the original's parameters
            self._stepped, self._handles, self.in_backward = set(), [], False

    # -----------------------------------------------------------------------------------------------------------------
    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked, and its rank against every shape.

        Raises:
            IsogridError: see the class.
        """
        place = f"parameter group {len(self.param_groups)}"
        options = checked({**self.defaults, **param_group}, place)
        super().add_param_group(options)
        group = self.param_groups[-1]
        try:
            for name, parameter in self._named(group, len(self.param_groups) - 1):
                if torch.is_complex(parameter):
                    raise IsogridError(f"{name} is complex; give torch.view_as_real of it")
                if projects(group, parameter):
                    _rank_of(name, group, parameter)
        except IsogridError:
            self.param_groups.pop()
            raise
        if getattr(self, "in_backward", False):
            self._register_hooks(sum(len(held["params"]) for held in self.param_groups[:-1]))

    def _named(self, group: dict[str, Any], number: int) -> Iterator[tuple[str, Tensor]]:
        names = group.get("param_names")
        for place, parameter in enumerate(group["params"]):
            called = f"parameter {place} of group {number}" if names is None else f"parameter {names[place]!r}"
            yield f"{called} {tuple(parameter.shape)}", parameter

    def _numbered(self) -> Iterator[tuple[int, str, dict[str, Any], Tensor]]:
        """(place among all parameters, name, group, parameter)."""
        index = 0
        for number, group in enumerate(self.param_groups):
            for name, parameter in self._named(group, number):
                yield index, name, group, parameter
                index += 1

    @property
    def projected(self) -> list[Tensor]:
        """The parameters whose moments live in a subspace."""
        return [p for group in self.param_groups for p in group["params"] if projects(group, p)]

    @property
    def skipped(self) -> int:
        """Steps of single parameters that were left out because the gradient was not finite."""
        return sum(int(state.get("skipped", 0)) for state in self.state.values())

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        With ``in_backward=True`` the steps were made during the backward pass, and this call only ends the step:
        learning-rate schedules, ``zero_grad`` and ``state_dict`` work as ever. There is then no gradient left to
        accumulate over several backward passes, to clip by a global norm, or to unscale. The hooks step as long as
        the optimizer is held.

        Args:
            closure: evaluates the model and returns the loss.

        Raises:
            IsogridError: a sparse gradient, or a gradient or a state of another shape than its parameter has by now.
                Nothing was stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepped.clear()
        waiting = [entry for entry in self._numbered() if entry[3].grad is not None]
        self._step(waiting)
        return loss

    def _step(self, waiting: list[tuple[int, str, dict[str, Any], Tensor]]) -> None:
        for _, name, group, parameter in waiting:
            require_usable(name, group, parameter)
            require_fit(name, parameter, self.state.get(parameter, {}), "begin a new optimizer", group)
        for group in self.param_groups:
            mine = [entry for entry in waiting if entry[2] is group]
            bucket: list[Work] = []
            numbers = 0
            for index, name, _, parameter in mine:
                if not projects(group, parameter) or parameter.numel() == 0:
                    continue
                if bucket and bucket[-1].parameter.device != parameter.device:  # one look at one GPU
                    step_projected(bucket)
                    bucket, numbers = [], 0
                wide = parameter.is_cuda if group["foreach"] is None else group["foreach"]
                bucket.append(self._work(index, name, group, parameter))
                numbers += parameter.numel()
                if not wide or numbers >= BUCKET:
                    step_projected(bucket)
                    bucket, numbers = [], 0
            if bucket:
                step_projected(bucket)
            plain = [Plain(p, name, index, self.state[p]) for index, name, _, p in mine if not projects(group, p)]
            if plain:
                step_plain(group, plain)

    def _work(self, index: int, name: str, group: dict[str, Any], parameter: Tensor) -> Work:
        rows = rows_of(parameter, name)
        columns = parameter.numel() // rows.total
        gradient = parameter.grad
        assert gradient is not None
        if is_sharded(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
            gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        here = local(gradient).detach()
        values = here if here.dtype == dtype else here.to(dtype)
        if values.ndim != 2:
            values = values.reshape(rows.stop - rows.start, columns)
        if not group["decoupled"] and group["weight_decay"]:
            weight = local(parameter.detach()).to(dtype).reshape(values.shape)
            values = values + group["weight_decay"] * weight
        state = self.state[parameter]
        if not state:
            state.update(fresh_state(rows.total, columns, group["refresh"]))
        side = side_of(group, rows.total, columns)
        return Work(parameter, name, index, group, state, GradientMatrix(values, rows), side)

    # -----------------------------------------------------------------------------------------------------------------
    # Steps during the backward pass

    def _register_hooks(self, start: int = 0) -> None:
        numbers = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        # Parameters hold their hooks, and would hold an optimizer that is long forgotten: it would step on.
        living = weakref.ref(self)
        for index, name, _, parameter in list(self._numbered()):
            if index < start or not parameter.requires_grad:
                continue

            def hook(held: Tensor, index: int = index, name: str = name, number: int = numbers[index]) -> None:
                if (optimizer := living()) is not None:
                    optimizer._step_in_backward(held, index, name, number)

            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def _step_in_backward(self, parameter: Tensor, index: int, name: str, number: int) -> None:
        if index in self._stepped:
            raise IsogridError(
                f"{name}: a second gradient before step(); with in_backward=True gradients can't be "
                "accumulated over several backward passes: call step() after each, or use in_backward=False"
            )
        if parameter.grad is None:
            raise IsogridError(
                f"{name}: another optimizer steps it during the backward pass and has freed its gradient; "
                "call that one's remove_hooks() before letting go of it"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            alone = torch.distributed.get_world_size() == 1 or is_sharded(parameter)
            if not alone:
                raise IsogridError(
                    f"{name}: with in_backward=True a replica would step before gradients are averaged; "
                    "shard the model with fully_shard, or use in_backward=False under DDP"
                )
        with torch.no_grad():
            # Loading replaces the groups, so they are looked up at every step.
            self._step([(index, name, self.param_groups[number], parameter)])
        self._stepped.add(index)
        parameter.grad = None

    def remove_hooks(self) -> None:
        """Give gradients back to the caller: steps are made by `step` alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.in_backward = False

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; every tensor keeps its own dtype and moves to its parameter's device.

        ``torch.distributed.checkpoint.load`` fills tensors of sizes known before; ranks that singular values choose,
        `ThresholdRank` and `EnergyRank`, it can't load: give a gathered state dict there.

        Raises:
            IsogridError: the state belongs to other shapes, or there are other groups. Nothing was loaded.
        """
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        entries = list(self._numbered())
        if [len(group["params"]) for group in state_dict["param_groups"]] != [
            len(group["params"]) for group in self.param_groups
        ]:
            raise IsogridError(
                f"the state has groups of {[len(group['params']) for group in state_dict['param_groups']]} parameters, "
                f"the optimizer of {[len(group['params']) for group in self.param_groups]}; build the same groups"
            )
        for number, group in enumerate(state_dict["param_groups"]):
            missing = [key for key in ("rank", "projector", "transition", "residual") if key not in group]
            if missing:
                raise IsogridError(
                    f"parameter group {number} of the state has no {missing[0]!r}; it is not ProjectedAdamW's"
                )
        for key, (_, name, _, parameter) in zip(saved, entries, strict=True):
            state = state_dict["state"].get(key, {})
            require_fit(name, parameter, state, "load it into the model it was saved from")
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype: codes would become numbers, float32 moments bfloat16.
        for key, (_, _, _, parameter) in zip(saved, entries, strict=True):
            for slot, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    moved = value.detach().to(parameter.device) if slot != "cosines" else value.detach()
                    self.state[parameter][slot] = moved.clone()
                else:
                    self.state[parameter][slot] = copy.deepcopy(value)

    def report(self) -> str:
        """How much is projected, in one line.

        Warns:
            IsogridWarning: nothing is.
        """
        every = [p for group in self.param_groups for p in group["params"]]
        projected = self.projected
        if not projected:
            warnings.warn("no parameter is projected: this is plain AdamW", IsogridWarning, stacklevel=2)
        numbers, total = sum(p.numel() for p in projected), sum(p.numel() for p in every)
        return (
            f"{len(projected)} of {len(every)} parameters projected, {numbers:,} of {total:,} numbers "
            f"({100 * numbers / max(total, 1):.1f} %)"
        )


def _rank_of(name: str, group: dict[str, Any], parameter: Tensor) -> int:
    if parameter.numel() == 0:
        return 0
    rows = parameter.shape[0]
    try:
        return as_rank_rule(group["rank"]).most(rows, parameter.numel() // rows)
    except IsogridError as error:
        raise IsogridError(f"{name}: {error}") from None
