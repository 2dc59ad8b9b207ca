"""The circles of imports that import-linter's contract for siblings does not see: a package and a module inside it."""

from __future__ import annotations

from graphlib import TopologicalSorter

import grimp


def test_no_import_leads_back():
    """No module or package imports itself through others, neither in a function nor for types."""
    graph = grimp.build_graph("moiety", "moiety_kernels", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules
