"""A ReftModel's adapter on disk: what its methods of saving and of loading into it promise."""

from __future__ import annotations

import os
from pathlib import Path

from reft_kernels import hub, model_files
from reft_kernels.config import ReftConfig, Representation
from reft_kernels.pyvene_methods import PyveneMethods


class SavedModel(PyveneMethods):
    """Saving to folders and the hub, and loading weights from them, in three libraries' formats."""

    config: ReftConfig
    representations: list[Representation]

    def save(
        self,
        save_directory: str | os.PathLike[str],
        save_to_hf_hub: bool = False,
        hf_repo_name: str = "my-awesome-model",
        include_model: bool = False,
        format: str = "reft_kernels",
    ) -> None:
        """Write the adapter to a folder, whole or not at all; an adapter that is there is replaced.

        Args:
            save_directory: a new or empty folder, or an adapter's.
            save_to_hf_hub: also put the folder into the repository ``hf_repo_name`` of the hub, as one commit.
            include_model: also save the base model's trainable parameters (a classifier head, LoRA).
            format: "reft_kernels", safetensors and JSON with every setting and the exact state; "pyreft", which pyreft
                loads; or "adapterhub", for AdapterHub's ``adapters``. ``load`` reads them all.

        Raises:
            FileExistsError: the folder holds anything else.
            ValueError: an unknown format, or edits that AdapterHub does not have.
        """
        model_files.save(self, Path(save_directory), include_model, format)
        if save_to_hf_hub:
            hub.upload_folder(save_directory, hf_repo_name)

    def load_adapter(self, load_directory: str | os.PathLike[str]) -> None:
        """Put the weights of a saved adapter into these interventions, which must be the same ones.

        Args:
            load_directory: a folder of any kind that ``load`` or ``load_intervention`` reads.

        Raises FileNotFoundError or ValueError naming file and key; nothing is loaded then.
        """
        model_files.load_adapter(self, Path(load_directory))

    def save_intervention(self, save_directory: str | os.PathLike[str], include_model: bool = True) -> None:
        """Write the interventions' weights under pyreft's names, and nothing else of the adapter, into a folder.

        Args:
            save_directory: made where it is missing; other files in it are left alone.
            include_model: also save the base model's trainable parameters.
        """
        model_files.save_weights(self, Path(save_directory), include_model)

    def load_intervention(self, load_directory: str | os.PathLike[str], include_model: bool = True) -> None:
        """Put saved weights into these interventions, on whatever device they are.

        Args:
            load_directory: a folder that ``save_intervention`` or ``save`` of this library or of pyreft wrote, or a
                checkpoint of pyreft's trainer.
            include_model: also load the base model's saved parameters; the folder must have them if any parameter of
                the base model is trainable.

        Raises FileNotFoundError or ValueError naming file and key; nothing is loaded then.
        """
        model_files.load_adapter(self, Path(load_directory), include_model)
