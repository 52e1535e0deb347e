"""What each script would do and what that costs, for `--plan`: one module a script, counted by common.plan."""
