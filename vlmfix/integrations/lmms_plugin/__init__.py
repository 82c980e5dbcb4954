"""What LMMS_EVAL_PLUGINS=vlmfix.integrations.lmms_plugin names: its models and its tasks.

The variable is deprecated in lmms-eval; with an installed vlmfix the entry point does the same.
"""
