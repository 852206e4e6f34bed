"""Planners and plan presets. Installed as `zept_nnunet.plans`."""
