import torch, traceback, logging
logging.disable(logging.CRITICAL)
from tests.families.cases import CASES
from tests.families.test_contract import build, retrofitted, tokens, AUTO, inputs_of
import rpb_retrofit as rpb
from rpb_retrofit.runtime.modeling import retrofit_class
from torch._subclasses.fake_tensor import FakeTensorMode
import copy, sys, contextlib
V='-v' in sys.argv
def attempt(f):
    try: r=f(); return 'ok'
    except BaseException as e:
        if V: traceback.print_exc()
        return 'FAIL '+type(e).__name__+' '+str(e)[:90].replace('\n',' ')
class MetaMode:
    def __enter__(self): self.c=torch.device('meta'); self.c.__enter__(); return self
    def __exit__(self,*a): self.c.__exit__(*a)
    name='meta'
for case in CASES:
    names=[a for a in sys.argv[1:] if a!='-v']
    if names and str(case) not in names: continue
    for label, mode in (('meta', lambda: torch.device('meta')), ('fake', FakeTensorMode)):
        s=None
        with mode():
            ids=torch.zeros(1,12,dtype=torch.long)
            src=attempt(lambda: build(case).eval()(**inputs_of(case, ids)))
            def rf():
                global m
                m=build(case).eval(); rpb.retrofit(m, rpb.RetrofitConfig(init='zeros')); 
            r=attempt(rf)
            def fwd(): m(**inputs_of(case, ids))
            f=attempt(fwd) if r=='ok' else '-'
            rp=attempt(lambda: repr(m)) if r=='ok' else '-'
            def cls():
                c=copy.deepcopy(retrofitted_config[str(case)]); return 0
            rev=attempt(lambda: rpb.revert(m)) if r=='ok' else '-'
            print(f'{str(case):16} {label} | src {src} | retrofit {r} | fwd {f} | repr {rp} | revert {rev}')
