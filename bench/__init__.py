"""What the stages and whole programs take, beside others in the same run."""

from blip2 import cli

cli.explain_missing_packages()
