"""The files of other libraries that train ReFT: pyreft's and AdapterHub's."""
