"""A base model with interventions: get_reft_model and ReftModel."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels import checkpoint, hub, model_files
from reft_kernels.config import ReftConfig, Representation
from reft_kernels.hooks import CallHook, InputHook, OutputHook, is_fusable
from reft_kernels.interventions import Intervention
from reft_kernels.locations import Places
from reft_kernels.modules import (
    Site,
    block_list,
    called_model,
    find_sites,
    hidden_size,
    indices_in_decoder,
)
from reft_kernels.orthogonal import shared_rows
from reft_kernels.plan import Plan, activated, active_plan
from reft_kernels.planner import Planner
from reft_kernels.positions import is_same_for_all
from reft_kernels.pyvene_methods import ReftModelOutput
from reft_kernels.recompute import Checkpoints
from reft_kernels.rotate_layer import orthonormal_parts
from reft_kernels.saved_model import SavedModel


def get_reft_model(
    model: nn.Module,
    reft_config: ReftConfig,
    set_device: bool = True,
    disable_model_grads: bool = True,
    *,
    pyreft_compat: bool = False,
) -> ReftModel:
    """Put the config's interventions into a model.

    Args:
        model: a model of transformers (or any module, where the config names the modules by path). It is kept, not
            copied, and gives the same results as before when it is called by itself.
        reft_config: what to edit, where and with what.
        set_device: move every intervention to the device of the module that it edits. The base model stays where
            it is, sharded or not.
        disable_model_grads: freeze the base model's parameters and put it into eval mode, as pyreft does. A
            later ``train()`` or ``eval()`` reaches base and interventions alike; new interventions are in train
            mode, as new modules are.
        pyreft_compat: see :class:`ReftModel`.

    Raises ValueError naming a layer, component or width that the model does not have.
    """
    reft_model = ReftModel(reft_config, model, pyreft_compat=pyreft_compat)
    if set_device:
        reft_model.set_device()
    if disable_model_grads:
        reft_model.disable_model_gradients()
    return reft_model


class ReftModel(SavedModel):
    """A base model whose hidden states are edited while it is called through this one.

    Args:
        config: a ReftConfig, or the representations that make one.
        model: the base model.
        pyreft_compat: do what pyreft on pyvene does also where that is a fault: ``train()`` and ``eval()`` do not reach
            the interventions, ``named_parameters()`` is a list of the trained ones under pyvene's names, ``generate``
            does not edit the prompt unless it is told to, and one call with an int or a flat list as
            ``unit_locations`` makes every later call write all rows of a batch at the first row's positions.

    Attributes:
        model: the base model.
        interventions: ModuleDict from a key such as ``layer_3_comp_block_output_unit_pos_nunit_1#0`` to the module.
        config: the ReftConfig.
        representations: one for each intervention, in the order of ``unit_locations``.
        inplace: write edits of ``block_output`` into the block's own output (True), which saves a copy. Turn it
            off for a block whose last operation keeps its output for its backward.

    Several interventions of one module that name no token in common are one edit. A token that two of them name is
    edited by one after the other, in their order.
    """

    def __init__(self, config: ReftConfig | Any, model: nn.Module, *, pyreft_compat: bool = False) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(config, (dict, list)):
            config = ReftConfig(config)
        if not isinstance(config, ReftConfig):
            raise TypeError(f"reft_config must be a ReftConfig, got {type(config).__name__}")
        count = len(block_list(model)[1]) if config.needs_layer_count else None
        representations = config.expand(count)
        sites = find_sites(model, representations)
        self.model = model
        self.config = config
        self.pyreft_compat = pyreft_compat
        self.inplace = True
        self._edits = True
        self.interventions = nn.ModuleDict()
        self.representations: list[Representation] = []
        self.keys: list[str] = []
        linked: dict[Any, nn.Module] = {}
        for item, site in zip(representations, sites, strict=True):
            key = _new_key(item, self.interventions)
            link = item.intervention_link_key
            intervention = linked[link] if link in linked else item.build(_embed_dim(model, item, site))
            if link is not None:
                linked[link] = intervention
            _check_width(key, intervention, site)
            self.interventions[key] = intervention
            self.keys.append(key)
            rank = getattr(intervention, "low_rank_dimension", item.low_rank_dimension)
            self.representations.append(
                dataclasses.replace(item, intervention=intervention, intervention_type=None, low_rank_dimension=rank)
            )
        self._owner = _Owner()
        self._register(sites)
        self._planner = Planner(
            self.model, self.interventions, self.representations, config.tied, self._places, self._owner,
            indices_in_decoder(self.model, sites),
        )  # fmt: skip

    def _register(self, sites: Sequence[Site]) -> None:
        """One hook for each edited side of a module."""
        members: dict[tuple[int, str], list[int]] = {}
        for index, site in enumerate(sites):
            members.setdefault((id(site.module), site.side), []).append(index)
        self._sites = [sites[ours[0]] for ours in members.values()]
        modules = list(self.interventions.values())
        self._places = Places(
            tuple(tuple(ours) for ours in members.values()), tuple(is_fusable(module) for module in modules)
        )
        self._handles = []
        for index, (site, ours) in enumerate(zip(self._sites, self._places.sites, strict=True)):
            names = [self.keys[i] for i in ours]
            if site.side == "output":
                hook = OutputHook(self._owner, index, site, names)
                self._handles.append(site.module.register_forward_hook(hook))
            else:
                before = InputHook(self._owner, index, site, names)
                self._handles.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
        call = CallHook(self._owner)
        body = called_model(self.model)
        self._handles.append(body.register_forward_pre_hook(call, with_kwargs=True))
        self._handles.append(body.register_forward_hook(call.after, with_kwargs=True))
        self._checkpoints = Checkpoints(self.model, sites)
        weakref.finalize(self, _remove, self._handles, self._checkpoints)

    def set_orthogonality(self, orthogonality: str, project: bool = False) -> None:
        """Another parametrisation of every R with orthonormal rows, which stays what it is to rounding.

        The parameters are new ones: make the optimiser afterwards.

        Args:
            orthogonality: "householder", "polar" or "none", see :func:`reft_kernels.stiefel.make_rows`.
            project: take the nearest orthonormal rows where R, trained freely, has no such rows any more.

        Raises ValueError for another name, or rows further than 1e-2 from orthonormal without ``project``; nothing has
        changed then.
        """
        modules = [m for m in self.interventions.values() if isinstance(m, Intervention) and m.orthonormal]
        converted = [module.rotate_layer.converted(orthogonality, project) for module in modules]
        for module, rows in zip(modules, converted, strict=True):
            module.rotate_layer.rows = rows
        self.config.orthogonality = orthogonality

    def remove_hooks(self) -> None:
        """Take this model's hooks off the base model, which then knows nothing of it. There is no way back."""
        _remove(self._handles, self._checkpoints)
        self._handles = []

    # Calling

    def forward(
        self,
        base: Mapping[str, Any] | None = None,
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        subspaces: Any = None,
        labels: Tensor | None = None,
        output_original_output: bool = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        intervention_additional_kwargs: Mapping[str, Any] | None = None,
        *,
        positions: str | None = None,
        intervention_locations: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Call the base model with the edits.

        Pyreft's way, ``reft_model({"input_ids": ...}, unit_locations={"sources->base": (None, L)})``, returns
        (original output or None, edited output); with keywords only, ``reft_model(input_ids=..., labels=...)``, the
        base model's own output, edited.

        Args:
            base: the base model's inputs.
            sources, source_representations: must be None (these interventions have no source).
            unit_locations: which tokens each intervention edits; counted within the tokens of this call. Forms:
                see ``positions.read_unit_locations``.
            subspaces: per intervention, passed on to interventions that are not of this library; built-in ones
                ignore it, as pyreft's do. Beside ``intervention_locations`` also an int tensor
                [B, num_interventions, k], as the data collator makes it.
            labels, use_cache: passed on where not None.
            return_dict: with ``base``, return a :class:`ReftModelOutput` instead of the pair; else passed on.
            intervention_additional_kwargs: keywords for the calls of interventions that are not of this library.
            output_original_output: also run the base model without edits.
            positions: instead of the config's, for this call.
            intervention_locations: int tensor [B, num_interventions, P], as the data collator makes it.
            input_ids, attention_mask, inputs_embeds, position_ids, token_type_ids, **model_kwargs: passed on.

        Where neither ``unit_locations`` nor ``intervention_locations`` is given, the positions of the call or of the
        config are computed on the device from the attention mask: the prompt is what is attended, for a causal
        language model with labels up to the first that is not -100. Without positions every token is edited.

        With a cache (``past_key_values``) everything attended so far counts as prompt, tokens that the caller has
        generated included; ``generate`` knows them apart.

        Raises TypeError or ValueError naming the argument.
        """
        del source_representations
        _no_sources(sources)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
            "labels": labels,
            "return_dict": return_dict if base is None else None,
            "use_cache": use_cache,
        }
        inputs = _join(base, {**{k: v for k, v in given.items() if v is not None}, **model_kwargs})
        if output_original_output and inputs.get("past_key_values") is not None:
            raise ValueError("output_original_output: two runs would write the one cache in past_key_values")
        original = self.model(**inputs) if output_original_output else None
        plan = self._planner.of_forward(
            inputs, unit_locations, intervention_locations, positions, subspaces, self.inplace
        )
        self._prepare(plan, unit_locations, intervention_additional_kwargs)
        with self._edited(plan):
            edited = self.model(**inputs)
        if base is None and not output_original_output:
            return edited
        if base is not None and return_dict:
            return ReftModelOutput(original, edited)
        return original, edited

    def generate(
        self,
        base: Mapping[str, Any] | None = None,
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        intervene_on_prompt: bool | None = None,
        subspaces: Any = None,
        output_original_output: bool = False,
        intervention_additional_kwargs: Mapping[str, Any] | None = None,
        *,
        positions: str | None = None,
        intervention_locations: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with the base model's own `generate`, the prompt edited.

        Positions are those of the prompt, and the edit is done once: with a cache the steps after the prompt run
        unedited; without one (``use_cache=False``) every pass edits the prompt again. Interventions without
        positions (or with "all") edit every token, prompt and generated ones, as in training. Beams and
        returned sequences share their prompt's positions.

        Args:
            base, unit_locations, subspaces, intervention_additional_kwargs, positions, intervention_locations: as in
                ``forward``.
            intervene_on_prompt: False edits every generated token instead and none of the prompt. None: True, or False
                with ``pyreft_compat``.
            output_original_output: also generate without edits, first.
            **kwargs: passed on to the base model's `generate`.

        Returns:
            What `generate` returns; with ``base`` (or with ``output_original_output``) the pair (original or None,
            edited).
        """
        del source_representations
        _no_sources(sources)
        inputs = _join(base, kwargs)
        run: Any = self.model.generate
        if intervene_on_prompt is None:
            intervene_on_prompt = not self.pyreft_compat
        plan = self._planner.of_generation(
            inputs, unit_locations, intervention_locations, positions, subspaces, self.inplace, intervene_on_prompt
        )
        original = run(**inputs) if output_original_output else None
        self._prepare(plan, unit_locations, intervention_additional_kwargs)
        if plan.edits_steps and hasattr(getattr(self.model, "generation_config", None), "disable_compile"):
            inputs.setdefault("disable_compile", True)  # or each step would be a graph of its own
        with self._edited(plan):
            edited = run(**inputs)
        if self._edits and not plan.called:
            called = type(called_model(self.model)).__name__
            raise RuntimeError(f"{type(self.model).__name__}.generate did not call its {called}: nothing was edited")
        if base is None and not output_original_output:
            return edited
        return original, edited

    def _prepare(self, plan: Plan, unit_locations: Any, additional_kwargs: Mapping[str, Any] | None) -> None:
        """What only interventions that are not of this library, and pyvene's ways, need of a plan."""
        self.full_intervention_outputs = plan.outputs
        if additional_kwargs:
            if any(self._places.fusable):
                raise ValueError(
                    "intervention_additional_kwargs are for interventions that take them, the library's own do not: "
                    f"got {sorted(additional_kwargs)}"
                )
            plan.additional_kwargs = additional_kwargs
        if self.pyreft_compat:
            self.use_fast = self.use_fast or is_same_for_all(unit_locations)
            if self.use_fast:
                plan.write_as_first_row()

    @contextmanager
    def edited(
        self,
        inputs: Mapping[str, Any],
        unit_locations: Any = None,
        intervention_locations: Tensor | None = None,
        positions: str | None = None,
        subspaces: Any = None,
    ) -> Iterator[None]:
        """Within this context a call of the base model, by whoever makes it with these inputs, is edited.

        Arguments as ``forward``.
        """
        plan = self._planner.of_forward(
            inputs, unit_locations, intervention_locations, positions, subspaces, self.inplace
        )
        with self._edited(plan):
            yield

    def is_editing(self) -> bool:
        """Whether this thread is within a call or a generation that is edited."""
        return active_plan(self._owner) is not None

    @contextmanager
    def _edited(self, plan: Plan) -> Iterator[None]:
        if not self._edits:
            yield
            return
        plan.rebuild = self.config.rebuild
        if plan.grad and not torch.compiler.is_compiling():
            self._checkpoints.follow()
        with activated(plan), shared_rows(orthonormal_parts(self.interventions.values())):
            yield

    @contextmanager
    def disable_edits(self) -> Iterator[None]:
        """Within this context the model is called, and generates, as its base model does without edits."""
        edits, self._edits = self._edits, False
        try:
            yield
        finally:
            self._edits = edits

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; with ``pyreft_compat`` pyvene's list of the trained ones."""
        return self.trained_parameters() if self.pyreft_compat else super().named_parameters(*args, **kwargs)

    # On disk

    @classmethod
    def load(
        cls,
        load_directory: str | os.PathLike[str],
        model: nn.Module,
        local_directory: str | os.PathLike[str] | None = None,
        from_huggingface_hub: bool = False,
        include_model: bool = False,
        classes: Mapping[str, type[nn.Module]] | None = None,
        *,
        act_fn: str | None = None,
        method: str | None = None,
        orthogonality: str | None = None,
        positions: str | None = None,
        pyreft_compat: bool = False,
    ) -> ReftModel:
        """A ReftModel in eval mode with the adapter of a folder; the base model is frozen, as by get_reft_model.

        Args:
            load_directory: a folder that ``save``, pyreft's ReftModel.save or AdapterHub's save_adapter wrote; or a
                repository of the hub with such files.
            model: the base model.
            local_directory: where to put the files of a repository (None: into the hub's own cache).
            from_huggingface_hub: ``load_directory`` is a repository, although there is a folder of that name.
            include_model: also put the saved parameters of the base model into it.
            classes: own intervention classes of the adapter, by name. No code is taken from the folder.
            act_fn: f of an adapter that pyreft saved, whose files do not say it (None: linear).
            method: "noreft" or "nodireft", of an adapter that AdapterHub saved without saying which.
            orthogonality: how R of an adapter of pyreft or AdapterHub shall be kept (None: "householder"); "none" takes
                one whose rows are not orthonormal.
            positions: "f7+l7" and the like, of an adapter that pyreft saved without (None: every token). Where the
                second half of its interventions has the places of the first they are untied, prefix and suffix.
            pyreft_compat: see :class:`ReftModel`.

        Raises FileNotFoundError or ValueError naming file and key.
        """
        folder = hub.local_folder(load_directory, local_directory, from_huggingface_hub)
        options = model_files.ReadOptions(classes, act_fn, method, orthogonality, positions)
        saved = model_files.read_adapter(folder, model, options)
        model_files.check_base(folder, saved, model)
        base_tensors = model_files.read_base_tensors(folder, model) if include_model else {}
        try:
            reft_model = cls(model_files.config_of(saved), model, pyreft_compat=pyreft_compat)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the adapter in {folder} does not fit: {error}") from error
        reft_model.set_device()
        reft_model.disable_model_gradients()
        checkpoint.put_base_tensors(base_tensors, model)
        return reft_model.eval()


def _remove(handles: Sequence[Any], checkpoints: Checkpoints) -> None:
    """The base model outlives its ReftModel and should not carry the hooks of one that is gone."""
    for handle in handles:
        handle.remove()
    checkpoints.release()


class _Owner:
    """Tells the hooks of one ReftModel from those of another."""


def _new_key(item: Representation, taken: nn.ModuleDict) -> str:
    """pyvene's name of a representation (since 0.1.7)."""
    component = item.component.replace(".", "_")
    place = f"comp_{component}" if item.is_path else f"layer_{item.layer}_comp_{component}"
    count = sum(key.rpartition("#")[0] == f"{place}_unit_pos_nunit_1" for key in taken)
    return f"{place}_unit_pos_nunit_1#{count}"


def _embed_dim(model: nn.Module, item: Representation, site: Site) -> int:
    """Length of the rows that an intervention still to be made will edit."""
    if item.intervention is not None:
        return 0
    width = site.width if site.width is not None else hidden_size(model)
    if width is None:
        raise ValueError(
            f"{item.place}: cannot tell how wide it is, {type(model).__name__} has no config.hidden_size; give "
            "intervention instead of intervention_type"
        )
    return width


def _check_width(key: str, intervention: nn.Module, site: Site) -> None:
    width = getattr(intervention, "embed_dim", None)
    if isinstance(width, int) and site.width is not None and width != site.width:
        raise ValueError(
            f"{key}: the {site.side} of {site.path} has {site.width} values a row, the intervention's embed_dim is "
            f"{width}"
        )


def _no_sources(sources: Any) -> None:
    if sources is not None:
        raise ValueError("sources must be None: these interventions have no source")


def _join(base: Mapping[str, Any] | None, keywords: Mapping[str, Any]) -> dict[str, Any]:
    if base is None:
        return dict(keywords)
    if not isinstance(base, Mapping):
        raise TypeError(
            f"base must be a dict of the model's inputs, such as {{'input_ids': ...}}, got {type(base).__name__}"
        )
    double = sorted(set(base) & set(keywords))
    if double:
        raise ValueError(f"{double[0]} is given twice, in base and as a keyword")
    return {**base, **keywords}
