# SPDX-License-Identifier: Apache-2.0
"""MoEFoldStrategy: the Lightning life cycle of a folded run. Fold and groups are in ``lifecycle/ranks.py``."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moefold.agreement import agreeing
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.balance.placement import Placement
from lightning_moefold.diagnostics.report import Place, print_without_traceback
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.dispatch.config import DispatcherName, DropPolicy, DropScope
from lightning_moefold.errors import HookError, InputError
from lightning_moefold.lifecycle.accumulation import StepAhead
from lightning_moefold.lifecycle.checkpoints import SharedCheckpoints
from lightning_moefold.lifecycle.even_batches import EvenBatches
from lightning_moefold.lifecycle.loaders import seed_workers
from lightning_moefold.lifecycle.precision import MoEFoldPrecision
from lightning_moefold.lifecycle.prediction import Predicting
from lightning_moefold.lifecycle.signals import requeue_together, stop_quietly
from lightning_moefold.lifecycle.step_check import NotFinite
from lightning_moefold.lifecycle.strategy_arguments import check_fold_arguments, check_run_arguments
from lightning_moefold.lifecycle.unsupported import check_optimizers, check_run
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.modules.attention.exchanges import Exchange
from lightning_moefold.modules.experts import cpu_cache
from lightning_moefold.modules.experts.kernels import ExpertKernel
from lightning_moefold.modules.recompute_parts import Recompute
from lightning_moefold.modules.routers import update_expert_bias
from lightning_moefold.optim.elementwise import elementwise_only
from lightning_moefold.optim.pieces import run_on_pieces
from lightning_moefold.optim.state_offload import bring_state
from lightning_moefold.parallel import PipelinePlan, Settings, Sharding, parallelize
from lightning_moefold.parallel.compiling import COMPILER, has_compiler
from lightning_moefold.parallel.hooks import check_hooks
from lightning_moefold.parallel.migration import Moved, move_experts
from lightning_moefold.parallel.parameters import ParameterRegistry
from lightning_moefold.parallel.replicated import ReplicatedModules, align_blocks, align_randomness
from lightning_moefold.parallel.settings import ShardingMode
from lightning_moefold.parallel.spare import spare_parameters
from lightning_moefold.planner.search.auto import AutoFold

log = logging.getLogger(__name__)


class MoEFoldStrategy(SharedCheckpoints):
    """Trains MoE language models with attention and experts under different parallel mappings over the same ranks.

    Data parallel sizes are derived: ``dp = world / (tp * cp * pp)`` for attention, ``edp = world / (etp * ep * pp)`` for experts.

    Args:
        tensor_parallel_size: Ranks over which attention and dense feed-forward layers are cut (with sequence
            parallelism).
        context_parallel_size: Ranks over which each row is cut, attention included.
        pipeline_parallel_size: Ranks over which the layers are spread.
        expert_parallel_size: Ranks over which the experts of a layer are spread.
        expert_tensor_parallel_size: Ranks over which each expert is cut.
        fold: All sizes in one string, such as ``"tp2 | ep4"``, instead of the arguments above; or ``"auto"``, and the
            planner chooses them for the model, the batch and the devices at hand, with ``num_microbatches``,
            ``pipeline_schedule``, ``num_stages_per_rank`` and ``recompute`` where those are left alone. Or a list, of which the
            first fold is taken that fits the number of ranks, so that a run can resume on fewer ranks.
        auto: The model, the batch or the machine that ``fold="auto"`` plans for, as far as the strategy cannot detect them.
        num_microbatches: Micro-batches of a batch; another number changes the auxiliary loss. None means 1; a pipeline
            needs a number.
        pipeline_schedule: ``"gpipe"``, ``"1f1b"``, ``"interleaved_1f1b"``, ``"interleaved_zero_bubble"``, ``"zbv"`` or
            ``"dualpipev"``.
        num_stages_per_rank: Pipeline stages on each rank, for the interleaved schedules; two for ``zbv`` and ``dualpipev``.
        pipeline_split: Number of layers of each stage, in the order of the model; cut by cost if not given.
        dispatcher: How tokens travel to their experts: ``"alltoall"`` once for each expert, ``"deduplicated"`` once for
            each rank that holds some of them, ``"allgather"`` to all ranks, ``"hierarchical"`` once to each node and
            from there once to each rank, or ``"auto"`` (:func:`~.dispatch.choose_dispatcher`).
        capacity_factor: Each expert computes at most ``ceil(capacity_factor * k * L / E)`` tokens of a row of L, and drops
            the rest; None to drop none.
        drop_policy: Which tokens an expert keeps: those of highest probability, ``"probs"``, or the first of the row,
            ``"position"``.
        drop_scope: Capacity is counted over whole rows, ``"full_sequence"``, the same under every fold, or over the tokens of a
            rank, ``"sub_sequence"``, whose result *depends on the fold*.
        pad_to_capacity: In training, send each expert as many rows as it may serve, so that no size depends on the data. Every
            rank then needs batches of the same shape.
        dispatch_chunks: Parts in which a layer's tokens travel, by expert, so that one part's exchange hides behind
            another's computation; the same bits. For ``"alltoall"``.
        node_size: Ranks that share fast links, for ``"hierarchical"``, ``"auto"`` and ``fold="auto"``; by default a machine's.
        expert_copies: Copies of busy experts on other ranks of ep, made anew in each pass
            (:class:`~.balance.fast.ExpertCopies`); the result is the same. None for none. Not with padding.
        expert_kernel: How gated experts compute. ``"loop"``: one expert after the other. ``"grouped_mm"``: all in one product.
            ``"fp8"``: like ``grouped_mm``, in FP8 except for the gradients of weights. ``"transformer_engine"``: its grouped
            products, in FP8 inside its ``autocast``. ``"auto"``: ``grouped_mm`` for bfloat16 on Hopper or newer GPUs, where
            the host then never waits for the device; otherwise ``loop``.
        data_parallel_sharding: ``"optimizer"`` shards with ``fully_shard`` and keeps weights gathered between forward
            and backward; ``"full"`` frees them after forward; ``"none"`` replicates weights and optimizer state.
        recompute: Activations that decoder layers compute again in backward: ``"full"`` all but a layer's input, ``"selective"``
            those of attention, or a list of ``"norm"``, ``"attention"``, ``"expert_activation"``, ``"moe"``, ``"mlp"``.
        offload_activations: Move the activations that decoder layers save for backward to host memory until then. No effect
            on CPU.
        context_parallel_exchange: How attention works over cp: ``"ring"``, ``"all_gather"``, ``"all_to_all"``, or
            ``"auto"`` by shape (:func:`~.modules.attention.context.choose_exchange`).
        calculate_per_token_loss: Divide the language-model loss of accumulated batches by the labels of the whole optimizer
            step, so that every label weighs the same, as in one large batch; auxiliary losses are averaged over the batches all
            the same. False averages the losses of the batches, as Lightning does. By default what the module's attribute of
            this name says (that of ``FineTuneModule`` is True), or False.
        sequence_parallel: Tokens between blocks are always spread over tp; only None and True are accepted.
        compile: Compile decoder layers with :func:`torch.compile`, in place: names, checkpoints and exports stay the same. On
            one rank a layer whose experts go by ``grouped_mm`` in bfloat16 is one graph; elsewhere graphs break at collectives,
            FSDP2's hooks, experts in a loop, and attention with a mask, which set-up says. Embedding, head and your modules run
            as they are. Without a C++ compiler (on CUDA: Triton and a C compiler) on all machines, one warning, and nothing is
            compiled. Not for schedules that split backward.
        checksums: Save checkpoints with a checksum of each stored part, and compare it when the part is read.
        async_save: Go on training while a checkpoint is written from a copy in the host's memory, one at a time.
        timeout: Timeout of the collectives.
        process_group_backend: ``"gloo"`` or ``"nccl"``; chosen by the device if not given.

    Raises:
        ValueError: For arguments that contradict each other or are not known.

    Example::

        trainer = L.Trainer(
            strategy=MoEFoldStrategy(tensor_parallel_size=2, expert_parallel_size=4),
            accelerator="cpu", devices=4)
    """

    strategy_name = "moefold"

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        context_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        expert_tensor_parallel_size: int = 1,
        *,
        fold: str | list[str] | None = None,
        auto: AutoFold | None = None,
        num_microbatches: int | None = None,
        pipeline_schedule: str = "1f1b",
        num_stages_per_rank: int = 1,
        pipeline_split: list[int] | None = None,
        dispatcher: DispatcherName = "alltoall",
        capacity_factor: float | None = None,
        drop_policy: DropPolicy = "probs",
        drop_scope: DropScope = "full_sequence",
        pad_to_capacity: bool = False,
        dispatch_chunks: int = 1,
        node_size: int | None = None,
        expert_copies: ExpertCopies | None = None,
        expert_kernel: ExpertKernel = "auto",
        data_parallel_sharding: ShardingMode = "optimizer",
        recompute: Recompute | None = None,
        offload_activations: bool = False,
        context_parallel_exchange: Exchange = "auto",
        calculate_per_token_loss: bool | None = None,
        sequence_parallel: bool | None = None,
        compile: bool = False,
        checksums: bool = True,
        async_save: bool = False,
        timeout: timedelta | None = default_pg_timeout,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__()
        sizes = (
            tensor_parallel_size, context_parallel_size, pipeline_parallel_size, expert_parallel_size, expert_tensor_parallel_size,
        )  # fmt: skip
        check_fold_arguments(fold, sizes, auto, pipeline_split)
        flags = {"compile": compile, "checksums": checksums, "async_save": async_save}
        check_run_arguments(flags, calculate_per_token_loss, sequence_parallel, timeout, process_group_backend)
        split = None if pipeline_split is None else tuple(pipeline_split)
        dispatch = DispatchConfig(
            dispatcher, capacity_factor, drop_policy, drop_scope, pad_to_capacity, dispatch_chunks, node_size, expert_copies,
        )  # fmt: skip
        self.settings = Settings(
            sharding=Sharding(data_parallel_sharding), plan=PipelinePlan(pipeline_schedule, num_stages_per_rank, split),
            num_microbatches=1 if num_microbatches is None else num_microbatches, dispatch=dispatch, expert_kernel=expert_kernel,
            recompute=recompute, exchange=context_parallel_exchange, compiler=COMPILER if compile else None,
            offload=offload_activations,
        )  # fmt: skip
        self._microbatches_given = num_microbatches is not None
        self._sizes, self._fold_text = sizes, fold if isinstance(fold, str) or fold is None else tuple(fold)
        self._auto = auto or AutoFold()
        self.calculate_per_token_loss, self.checksums, self.async_save = calculate_per_token_loss, checksums, async_save
        self._timeout = timeout
        self._process_group_backend = process_group_backend
        self._converted: weakref.ref[torch.nn.Module] | None = None
        self._own: ReplicatedModules | None = None
        self._predicting: Predicting | None = None
        self._even: EvenBatches | None = None
        self._epoch_begins = True
        self._watched: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    # ---- what Lightning asks -----------------------------------------------------------------------------------

    @property
    def is_distributed(self) -> bool:
        """Lightning injects samplers and reduces logged values only where this is true.

        On one rank it is true of a model that ranks could share, which is dealt the same rows under every fold.
        """
        return self.world_size > 1 or self._sharded

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else MoEFoldPrecision(Precision())

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and not isinstance(plugin, MoEFoldPrecision):
            plugin = MoEFoldPrecision(plugin)
        self._precision_plugin = plugin

    # ---- set-up ------------------------------------------------------------------------------------------------

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        # A MoECausalLM made here gets no storage: setup() parallelises it, then each rank reads its slices. Other modules are
        # made as they are, so that initialisation by hand in configure_model is not lost.
        with deferred_weights(), self.precision_plugin.tensor_init_context():
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        if self._mesh is None:
            self._choose_fold(last_call=True)
            self._make_mesh()
        check_run(trainer, self._module, self._settings_of_run(), self.mesh)
        if self._fitting:
            self._check_hooks()
            if self._spreads and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._check_places(trainer, self.mesh.world)
        self.accelerator.setup(trainer)
        validation = trainer.fit_loop.epoch_loop.val_loop
        loops = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop, validation)
        for loop in loops if self._spreads else ():
            loop.inference_mode = False  # FSDP2 and DTensor do not go with inference tensors
        if self._layer_sync is not None and self._fitting:
            self.model = self._layer_sync.apply(self.model)
        self._convert()
        self._parallelize()
        self.model_to_device()
        self._registry = ParameterRegistry(self._module, self.mesh)
        self._own = ReplicatedModules(self._module, self._registry, self.mesh)
        self._own.prepare()
        align_randomness(self.mesh, self.root_device)
        self._precision.prepare(self._registry, self.root_device)
        self.barrier("setup")
        if self._fitting:
            self.setup_optimizers(trainer)
            check_optimizers(trainer, self._registry.sharded)
            self._prepare_saves(trainer)
        self.setup_precision_plugin()
        if self._fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
            self._step_ahead = StepAhead(trainer, self._module) if self._per_token_loss else None
        if trainer.state.fn == TrainerFn.PREDICTING:
            self._predicting = Predicting(trainer, self._module)
        elif self.world_size > 1:
            self._even = EvenBatches(trainer, self.mesh, evaluation=self._spreads)

    @property
    def _per_token_loss(self) -> bool:
        asked = getattr(self._module, "calculate_per_token_loss", False)
        return asked if self.calculate_per_token_loss is None else self.calculate_per_token_loss

    def _check_hooks(self) -> None:
        """Refuses hooks on gradients where more than one rank has a part of them, or FSDP2 keeps the weights. Collective."""
        mixed = self._precision.mixed_dtype is not None and bool(self._roots())
        if self.world_size == 1 and not mixed:
            return
        with agreeing(self.mesh.world, HookError):
            check_hooks(self._module, f"in {self._precision.precision}" if mixed else f"under {self.fold}")

    @override
    def _convert(self) -> None:
        assert self.model is not None
        if self._converted is None or self._converted() is not self.model:  # once a module, not once an entry point
            self.model = self.precision_plugin.convert_module(self.model)
            self._converted = weakref.ref(self.model)

    def _parallelize(self) -> None:
        """Parallelises the models that are not yet; an error on one rank is raised on all."""
        align_blocks(self._module, self.mesh)
        settings = self._settings_of_run()
        if settings.compiles and not has_compiler(self.root_device, self.reduce_boolean_decision):
            settings = replace(settings, compiler=None)
        with agreeing(self.mesh.world):
            parallelize(self._module, self.mesh, settings, self.root_device)

    def _settings_of_run(self) -> Settings:
        sharding = replace(self.settings.sharding, mixed_dtype=self._precision.mixed_dtype)
        return replace(self.settings, sharding=sharding).with_node_size(self.num_processes)

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self._reset_optimizers_and_schedulers()  # those of an earlier entry point may refer to parameters that are gone
        with spare_parameters(self._module.modules()):
            super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            run_on_pieces(optimizer, self.registry.names)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        seed_workers(dataloader, self.dp_rank)
        self._data_order.prepare(dataloader, self._module.trainer, self.dp_rank, self.dp_size)
        if self._even is not None:
            self._even.check_loader(dataloader)
        return dataloader

    # ---- running -----------------------------------------------------------------------------------------------

    @override
    def on_train_start(self) -> None:
        self._check_hooks()  # hooks may have been registered since the set-up
        self._epoch_begins = True
        requeue_together(self._module.trainer)
        self._stop_quietly()
        self._data_order.begin(self._module.trainer, self.dp_size)
        if self._even is not None:
            self._even.begin_training()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._even is not None:
            self._even.train()
        if self._epoch_begins or batch_idx == 0:  # hooks of the user's that come before this one may register some
            self._check_hooks()
            self._epoch_begins = False
        if self._step_ahead is not None:
            self._step_ahead.begin(batch)

    @override
    def on_validation_start(self) -> None:
        self._stop_quietly()
        if self._even is not None:
            self._even.begin_evaluation(self._module.trainer._evaluation_loop.max_batches)

    on_test_start = on_validation_start

    def _evaluate(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        """Before a batch of an evaluation."""
        if self._even is not None:
            self._even.evaluate(dataloader_idx)
        self._synchronize_own_buffers()

    @override
    def on_predict_start(self) -> None:
        self._stop_quietly()

    def _stop_quietly(self) -> None:
        if self.world_size > 1:
            stop_quietly(self._module.trainer)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        # Whole gradients are what "full" is to save: there every batch's are scattered and added up in pieces.
        waits = self.settings.sharding.mode != "full"
        units = [m for m in self._module.modules() if isinstance(m, FSDPModule)] if waits else []
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        self._precision.gradient_sum.deferred = True
        try:
            yield
        finally:
            self._precision.gradient_sum.deferred = False
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any | None = None, **kwargs: Any
    ) -> Any:
        try:
            with self._watch(optimizer):
                output = super().optimizer_step(optimizer, closure, model, **kwargs)
            update_expert_bias(self._module)
        except NotFinite as skipped:
            output = None
            assert self._precision.step_check is not None
            self._precision.step_check.failed(skipped)
        # A forward pass between backward and here (in on_before_optimizer_step, say) has gathered weights that are now old.
        self._release_gathered_weights()
        return output

    @property
    def _user_looks_before_backward(self) -> bool:
        """Whether code of the user's runs between forward and backward.

        Parameters are gathered copies without gradients there, and ``self.zero_grad()`` would clear nothing; such code
        sees this rank's pieces instead.
        """
        module = self._module
        callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
        return is_overridden("optimizer_zero_grad", module) or any(
            is_overridden(hook, owner, parent)
            for hook in ("on_before_zero_grad", "on_before_backward")
            for owner, parent in ((module, pl.LightningModule), *((c, pl.Callback) for c in callbacks))
        )

    @contextmanager
    def _watch(self, optimizer: Optimizer) -> Generator[None, None, None]:
        """The first step of an optimizer shows whether it can be right on pieces of parameters, and stored."""
        if not self._sharded or self.mesh.world.size == 1 or optimizer in self._watched:
            yield
            return
        with elementwise_only(optimizer):
            yield
        self._watched.add(optimizer)  # unless the step was skipped
        self._check_state(optimizer)

    def _synchronize_own_buffers(self) -> None:
        if self._own is not None:
            self._own.synchronize_buffers()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._synchronize_own_buffers()
        with nullcontext() if self._step_ahead is None else self._step_ahead.told():
            output = super().training_step(*args, **kwargs)
        if self._user_looks_before_backward:
            self._release_gathered_weights()
        if self._own is not None:
            self._own.buffers_stale = not self._precision.gradient_sum.deferred
        return output

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._evaluate(*args, **kwargs)
        return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._evaluate(*args, **kwargs)
        return super().test_step(*args, **kwargs)

    @override
    def on_validation_end(self) -> None:
        self._release_gathered_weights()

    on_test_end = on_predict_end = on_validation_end

    # ---- experts that are copied, and that move ------------------------------------------------------------------

    def copy_experts(self, copies: ExpertCopies) -> None:
        """Asks for copies of busy experts where nothing speaks against them; for callbacks, before the set-up.

        Nothing changes if the strategy has its own ``expert_copies``, or padding or a kernel that does not go with copies, or if
        one rank holds all experts.
        """
        dispatch = self.settings.dispatch
        unfit = (
            dispatch.pad_to_capacity or self.settings.expert_kernel == "transformer_engine" or self._fold_text == "auto"
        )
        if dispatch.copies is None and not unfit and self.fold.ep > 1:
            self.settings = replace(self.settings, dispatch=replace(dispatch, copies=copies))

    def move_experts(self, placements: Mapping[str, Placement]) -> Moved:
        """Brings experts to other ranks, with gradients and optimizer state. Collective, between two optimizer steps.

        Args:
            placements: Where the experts of a layer shall be, by its name in the LightningModule; other layers stay.

        Raises:
            InputError: For an unknown layer or a placement that is not of its experts and ep, on every rank; and while
                batches accumulate.
            UnsupportedFeature: For state of an optimizer that is not kept expert by expert, on every rank.
        """
        trainer = self._module.trainer
        if trainer.training and trainer.fit_loop.epoch_loop._should_accumulate():
            raise InputError(
                "experts move between two optimizer steps, and gradients of accumulated batches wait for the next one; call "
                "move_experts after the step."
            )
        for optimizer in self.optimizers:
            bring_state(optimizer)
        return move_experts(self.registry, self.optimizers, placements)

    # ---- the end -----------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        place = None if self._mesh is None else Place(self._mesh, self.settings.plan, self._roll_call)
        print_without_traceback(exception, self.global_rank, place)

    @override
    def teardown(self) -> None:
        self._end_saves()
        beside, self._predicting, self._even, self._step_ahead = (self._predicting, self._even), None, None, None
        for callback in beside:
            if callback is not None:
                callback.finish()
        # Unlike the base class: sharded parameters stay where they are.
        if self._layer_sync is not None and self.model is not None:
            self.model = self._layer_sync.revert(self.model)
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()
        cpu_cache.release()

    # ---- copies ------------------------------------------------------------------------------------------------

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to these processes and to this set-up; the copy's own set-up makes it anew."""
        here = (
            "_mesh", "_registry", "_converted", "_own", "_roll_call", "_predicting", "_even", "_step_ahead", "_background",
            "_watched",
        )  # fmt: skip
        return {**super().__getstate__(), **dict.fromkeys(here)}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_watched": weakref.WeakSet()})
