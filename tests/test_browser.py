"""Lessons in a real JupyterLab: headless Chromium opens them, runs all cells, moves each slider and looks at the pictures.

Needs Chromium and playwright: `make browser-deps` gets both. Without them the tests are skipped and say so.
"""
import importlib.util, json, os, secrets, shutil, socket, subprocess, sys, time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ('00_tour', '41_sampling')
CHROMIUM = os.environ.get('AUDIOREPRO_CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
MISSING = [name for name, found in (('Chromium', CHROMIUM), ('playwright', importlib.util.find_spec('playwright'))) if not found]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not found: run `make browser-deps`")

FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
         '--disable-sync', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
SETTINGS = {  # no questions about news, every cell in the page even when it is out of sight
    'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
    'notebook-extension/tracker': dict(windowingMode='none')}
CELLS = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].map(cell => ({
    prompt: cell.querySelector('.jp-InputPrompt').textContent.trim(),
    errors: [...cell.querySelectorAll('[data-mime-type^="application/vnd.jupyter.std"], [data-mime-type="application/vnd.jupyter.error"]')]
        .filter(e => !e.dataset.mimeType.endsWith('stdout')).map(e => e.textContent.trim())
        .filter(text => text.includes('Traceback (most recent call last)') || /^\\w*(Error|Exception|Exit|Interrupt)\\b/.test(text.split('\\n').pop()))}))"""
PICTURES = """async handle => {
    const found = [], area = handle.closest('.jp-CodeCell').querySelector('.jp-Cell-outputWrapper');
    for (const img of area.querySelectorAll('img')) {
        if (!img.complete || !img.naturalWidth) continue;
        const bytes = await (await fetch(img.src)).arrayBuffer();
        const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
        found.push([...hash].map(b => b.toString(16).padStart(2, '0')).join(''));
    }
    for (const canvas of area.querySelectorAll('canvas')) found.push(canvas.toDataURL());
    return found; }"""


# --- the server and the browser -------------------------------------------------------------------------------------

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def environment(home):
    "Settings, run files and outputs of their own; the kernel imports this checkout"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('JUPYTER', 'AUDIOREPRO', 'PYTEST'))}
    paths = [str(ROOT), *filter(None, [env.get('PYTHONPATH')])]
    return env | {f'JUPYTER_{k}_DIR': str(home/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')} | dict(
        PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS='1', AUDIOREPRO_OUT=str(home/'out'), IPYTHONDIR=str(home/'ipython'),
        HF_HUB_OFFLINE='1', JUPYTER_TOKEN=secrets.token_hex(16))


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab on a free port of the loopback: (its address, folder of its notebooks, its token)

    One for each test: a second notebook in the same Lab would find the first one open, and its kernel running.
    """
    home = tmp_path/'lab'
    env, work = environment(home), home/'notebooks'
    work.mkdir(parents=True)
    for name, values in SETTINGS.items():
        file = home/'config'/'lab'/'user-settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={free_port()}',
               f'--ServerApp.root_dir={work}']
    with open(home/'server.log', 'w') as log: server = subprocess.Popen(command, env=env, cwd=work, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        note, end = home/'runtime'/f'jpserver-{server.pid}.json', time.time() + 120
        while not note.exists():
            if server.poll() is not None or time.time() > end: pytest.fail(f"JupyterLab did not start:\n{(home/'server.log').read_text()[-3000:]}")
            time.sleep(.1)
        yield f"http://127.0.0.1:{json.loads(note.read_text())['port']}", work, env['JUPYTER_TOKEN']
    finally:
        server.terminate()
        try: server.wait(30)
        except subprocess.TimeoutExpired: server.kill()


@pytest.fixture(scope='module')
def chromium():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


# --- what is looked at ----------------------------------------------------------------------------------------------

def until(page, ready, seconds):
    "The first true value of `ready()`, or None when the time is over"
    end = time.time() + seconds
    while not (value := ready()):
        if time.time() > end: return None
        page.wait_for_timeout(200)
    return value


def run_all(page, seconds):
    "Run all cells from the menu; what the page says of each code cell when nothing runs any more"
    page.locator('#jp-MainMenu .lm-MenuBar-itemLabel', has_text='Run').first.click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
    def finished():
        cells = page.evaluate(CELLS)
        is_over = all(c['prompt'].strip('[]:').isdigit() for c in cells) or any(c['errors'] for c in cells)
        return cells if is_over and not any('*' in c['prompt'] for c in cells) else None
    return until(page, finished, seconds) or page.evaluate(CELLS)


def move(page, handle, seconds):
    "Move a slider by one key press and back: '' when its picture follows both times, else what is wrong"
    pictures = lambda: handle.evaluate(PICTURES)
    before = until(page, pictures, seconds)
    if not before: return 'has no picture'
    at_end = float(handle.get_attribute('aria-valuenow')) >= float(handle.get_attribute('aria-valuemax'))
    there, back = ('ArrowLeft', 'ArrowRight') if at_end else ('ArrowRight', 'ArrowLeft')
    handle.focus()
    page.keyboard.press(there)
    if not until(page, lambda: (now := pictures()) and now != before, seconds): return 'does not change its picture'
    handle.focus()
    page.keyboard.press(back)
    if not until(page, lambda: pictures() == before, seconds): return 'moved back does not bring its picture back'
    return ''


def sliders(page):
    "(name, handle) of each slider of the notebook"
    handles = page.locator('.jp-CodeCell .jp-Cell-outputWrapper [role="slider"]').element_handles()
    label = "h => h.closest('.widget-slider, .jupyter-widgets')?.querySelector('.widget-label')?.textContent || 'without a name'"
    return [(h.evaluate(label), h) for h in handles]


def complaints(chromium, lab, path, seconds=600, patience=120):
    "Open a copy of a notebook, run all, move each slider; (what is wrong, names of the sliders)"
    url, work, token = lab
    nb = json.loads(Path(path).read_text())
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cell |= dict(outputs=[], execution_count=None)  # what is seen later was made here
    (work/Path(path).name).write_text(json.dumps(nb))
    context, wrong, asked = chromium.new_context(viewport=dict(width=1200, height=1600)), [], []
    context.on('request', lambda r: asked.append(urlsplit(r.url)))
    try:
        page = context.new_page()
        page.on('websocket', lambda w: asked.append(urlsplit(w.url)))
        page.goto(f'{url}/lab/tree/{Path(path).name}?token={token}')
        page.locator('#jp-main-statusbar', has_text='| Idle').wait_for(timeout=120_000)
        cells, count = run_all(page, seconds), sum(c['cell_type'] == 'code' for c in nb['cells'])
        prompts = [c['prompt'] for c in cells]
        if prompts != [f'[{i + 1}]:' for i in range(count)]: wrong.append(f'not every cell has run once, in order: {prompts}')
        names = []
        for name, handle in sliders(page):
            names.append(name)
            if fault := move(page, handle, patience): wrong.append(f'slider {name!r} {fault}')
        wrong += [f'cell {i + 1}: {e.splitlines()[-1]}' for i, c in enumerate(page.evaluate(CELLS)) for e in c['errors']]
    finally: context.close()
    outside = sorted({a.hostname or '' for a in asked if a.scheme not in ('data', 'blob')} - {'127.0.0.1'})
    return wrong + [f'asks {host}' for host in outside], names


# --- tests ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stem', LESSONS)
def test_lesson_runs_and_its_sliders_move(chromium, lab, stem):
    wrong, names = complaints(chromium, lab, ROOT/'nbs'/f'{stem}.ipynb')
    assert not wrong
    assert len(names) == 2


MADE_UP = ['''import io, ipywidgets as widgets, audiorepro
from PIL import Image
def grey(n):
    file = io.BytesIO()
    Image.new('L', (9, 9), 20*n).save(file, 'png')
    return file.getvalue()
def panel(name, follow):
    slider, picture = widgets.IntSlider(3, 0, 9, description=name), widgets.Image(value=grey(3))
    slider.observe(lambda change: follow(picture, change['new']), 'value')
    return widgets.VBox([slider, picture])
print(audiorepro.__file__)''',
    "def show(picture, n): picture.value = grey(n)\npanel('good', show)",
    "panel('idle', lambda picture, n: None)",
    "def count(picture, n, seen=[]): seen.append(n); picture.value = grey(len(seen))\npanel('drifts', count)",
    '''screen, slider = widgets.Output(), widgets.IntSlider(3, 0, 9, description='raises')
def draw(change):
    screen.clear_output(wait=True)
    with screen: display(Image.open(io.BytesIO(grey(slider.value)))) if slider.value == 3 else [][slider.value]
slider.observe(draw, 'value'); draw(None)
widgets.VBox([slider, screen])''',
    "widgets.IntSlider(description='alone')",
    "widgets.HTML('<img src=\"http://192.0.2.1/far.png\">')",  # an address that belongs to nobody
    '1/0',
    "print('never run')"]


def test_faults_are_found(chromium, lab, tmp_path):
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(MADE_UP)]
    path = tmp_path/'made_up.ipynb'
    path.write_text(json.dumps(dict(cells=cells, nbformat=4, nbformat_minor=5, metadata=dict(
        kernelspec=dict(name='python3', display_name='python3', language='python')))))
    wrong, names = complaints(chromium, lab, path, patience=5)
    assert names == ['good', 'idle', 'drifts', 'raises', 'alone']
    assert wrong[0].startswith('not every cell has run') and "'[8]:', '[ ]:']" in wrong[0]
    assert wrong[1:] == ["slider 'idle' does not change its picture", "slider 'drifts' moved back does not bring its picture back",
                         "slider 'raises' does not change its picture", "slider 'alone' has no picture", 'cell 5: IndexError: list index out of range',
                         'cell 8: ZeroDivisionError: division by zero', 'asks 192.0.2.1']
