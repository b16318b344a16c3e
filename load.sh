cd /src; export LANG=C.UTF-8 PYTHONPATH=/src:/src/src
/venv-qemus/bin/python -m pytest -q -p no:cacheprovider "$@"
