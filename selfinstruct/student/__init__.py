"""The student: fine-tune a model on a dataset, run it, serve it. Needs the ``train`` extra; only it loads torch."""
