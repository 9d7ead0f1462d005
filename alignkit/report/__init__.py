"""Reports of finished and unfinished runs: ``alignkit report``, ``compare`` and ``table``. torch is not imported."""
