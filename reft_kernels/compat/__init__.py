"""For people with pyreft: an installed pyreft made fast and mended in place, and its files and AdapterHub's."""

from reft_kernels.compat.patch import PatchReport, patch_pyreft, unpatch_pyreft

__all__ = ["PatchReport", "patch_pyreft", "unpatch_pyreft"]
