"""Models and tasks for LMMS_EVAL_PLUGINS=vlmfix.integrations.lmms_plugin.

The variable is deprecated in lmms-eval; with an installed vlmfix the entry point does the same.
"""
