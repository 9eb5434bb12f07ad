mkdir -p runs/tiny/m=0.3,exclusive.weight=1,seed=0
exec python -m marginface.main --config tiny.py --config.loss.margin_kw.m=0.3 --config.regularizers.exclusive.weight=1.0 --config.seed=0 --workdir runs/tiny/m=0.3,exclusive.weight=1,seed=0 --coordinator auto >> runs/tiny/m=0.3,exclusive.weight=1,seed=0/log.txt 2>&1
