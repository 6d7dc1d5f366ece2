"""`python -m lenet_deploy.cli`: the same as `lenet-deploy`."""

from . import app

app()
