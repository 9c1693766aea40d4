"""The groups of settings that Hydra composes a run from, as YAML files. The notebook config tells how."""
