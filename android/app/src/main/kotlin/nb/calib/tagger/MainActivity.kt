package nb.calib.tagger

import android.app.Activity
import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.view.View
import android.view.WindowManager
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ProgressBar
import android.widget.RadioButton
import android.widget.RadioGroup
import android.widget.TextView
import java.io.File
import java.io.IOException

/** The one screen: choose program and images, start, read the result. All work is [ModelBenchmark]'s, on a thread. */
class MainActivity : Activity() {
    private val benchmark by lazy { ModelBenchmark(applicationContext) }
    @Volatile private var program: ProgramFile? = null
    private var photos: List<Photo> = emptyList()
    private var worker: Thread? = null
    @Volatile private var stopped = false

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.activity_main)
        view<Button>(R.id.choose_program).setOnClickListener { choose("*/*", PROGRAM, false) }
        view<Button>(R.id.choose_photos).setOnClickListener { choose("image/*", PHOTOS, true) }
        view<Button>(R.id.start).setOnClickListener { if (worker == null) start() else stopped = true }
        val device = benchmark.device()
        text(R.id.device, getString(R.string.device_line, device.maker, device.model, device.chip, device.android, device.abi))
        last?.let { showReport(it.first, it.second, it.third) } // dark mode and language make the screen again
        work {
            val files = benchmark.programs()
            val there = benchmark.photos()
            runOnUiThread {
                showPhotos(there)
                showPrograms(files)
                if (intent.getBooleanExtra("run", false)) begin(intent)
            }
        }
    }

    override fun onNewIntent(intent: Intent) {
        super.onNewIntent(intent)
        if (intent.getBooleanExtra("run", false)) begin(intent)
    }

    override fun onDestroy() {
        stopped = true
        super.onDestroy()
    }

    /** A start by adb: `am start -n nb.calib.tagger/.MainActivity --ez run true --ei seconds 60`. */
    private fun begin(intent: Intent) {
        for ((id, key) in listOf(R.id.runs to "runs", R.id.seconds to "seconds")) {
            if (intent.hasExtra(key)) view<EditText>(id).setText(intent.getIntExtra(key, 0).toString())
        }
        photos = benchmark.photos()
        showPhotos(photos)
        start()
    }

    private fun choose(type: String, code: Int, several: Boolean) {
        val ask = Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType(type)
        startActivityForResult(ask.putExtra(Intent.EXTRA_ALLOW_MULTIPLE, several), code)
    }

    override fun onActivityResult(code: Int, result: Int, data: Intent?) {
        super.onActivityResult(code, result, data)
        val uris = uris(data ?: return)
        if (result != RESULT_OK || uris.isEmpty()) return
        if (code == PHOTOS) showPhotos(benchmark.photos(uris)) else work {
            benchmark.choose(uris[0])
            val files = benchmark.programs()
            runOnUiThread { showPrograms(files, files.last()) }
        }
    }

    private fun uris(data: Intent): List<Uri> {
        val clip = data.clipData
        return if (clip != null) List(clip.itemCount) { clip.getItemAt(it).uri } else listOfNotNull(data.data)
    }

    private fun showPhotos(chosen: List<Photo>) {
        photos = chosen
        text(R.id.photos_about, resources.getQuantityString(R.plurals.photos_count, chosen.size, chosen.size))
    }

    private fun showPrograms(files: List<File>, selected: File? = files.firstOrNull()) {
        val group = view<RadioGroup>(R.id.programs)
        group.removeAllViews()
        for (file in files) {
            val button = radio(file.name, true) { describe(file) }
            group.addView(button)
            if (file == selected) group.check(button.id)
        }
        if (selected == null) showFault(Refusal(Fault.NO_PROGRAM)) else describe(selected)
    }

    private fun describe(file: File) = work {
        program = null
        val described = benchmark.describe(file)
        val registered = ModuleNet.registered()
        program = described
        runOnUiThread {
            val spec = described.spec
            text(
                R.id.program_about,
                getString(R.string.program_line, spec.model, file.length() / 1e6, spec.classes.size, spec.size),
            )
            showBackends(Backends.options(described.program.delegates, registered))
        }
    }

    private fun showBackends(options: List<BackendOption>) {
        val group = view<RadioGroup>(R.id.backends)
        group.removeAllViews()
        for (option in options) {
            val words = when (option.state) {
                State.READY -> R.string.option
                State.NOT_IN_PROGRAM -> R.string.option_not_in_program
                State.NOT_IN_BUILD -> R.string.option_not_in_build
            }
            val button = radio(getString(words, option.processor.name, option.title), option.state == State.READY) {}
            group.addView(button)
            if (option.state == State.READY) group.check(button.id)
        }
    }

    private fun radio(words: String, enabled: Boolean, chosen: () -> Unit) = RadioButton(this).apply {
        id = View.generateViewId()
        text = words
        isEnabled = enabled
        minHeight = (48 * resources.displayMetrics.density).toInt()
        setTextColor(getColor(if (enabled) R.color.text else R.color.faint))
        setOnClickListener { chosen() }
    }

    private fun number(id: Int) = view<EditText>(id).text.toString().toIntOrNull() ?: 0

    private fun start() {
        val chosen = program ?: return showFault(Refusal(Fault.NO_PROGRAM))
        val plan = Plan(runs = maxOf(1, number(R.id.runs)), seconds = number(R.id.seconds))
        running(true)
        worker = work(finally = { running(false) }) {
            val (report, about) = try {
                benchmark.run(chosen, photos, plan, { visits, last -> progress(visits, last, plan) }, { stopped })
            } catch (e: Refusal) {
                benchmark.save(e)
                throw e
            }
            if (report.results.isNotEmpty()) {
                val file = benchmark.save(report, about)
                last = Triple(report, about, file)
                runOnUiThread { showReport(report, about, file) }
            }
        }
    }

    private fun running(now: Boolean) {
        stopped = false
        if (!now) worker = null
        view<Button>(R.id.start).setText(if (now) R.string.stop else R.string.start)
        view<View>(R.id.progress).visibility = if (now) View.VISIBLE else View.GONE
        if (now) view<View>(R.id.fault_card).visibility = View.GONE
        val keep = WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON
        if (now) window.addFlags(keep) else window.clearFlags(keep)
    }

    private fun progress(visits: Int, last: PhotoResult, plan: Plan) = runOnUiThread {
        val bar = view<ProgressBar>(R.id.progress)
        bar.max = 1000
        val share = if (plan.seconds > 0) last.at / plan.seconds else visits.toDouble() / photos.size
        bar.progress = (1000 * minOf(1.0, share)).toInt()
        text(R.id.progress_text, getString(R.string.progress_line, visits, last.runMs, last.name))
    }

    private fun showReport(report: Report, about: Map<String, Any?>, file: File) {
        view<View>(R.id.result_card).visibility = View.VISIBLE
        view<View>(R.id.tags_card).visibility = View.VISIBLE
        text(R.id.per_image, getString(R.string.ms, report.total.median))
        text(R.id.quartiles, getString(R.string.quartiles, report.total.low, report.total.high))
        text(R.id.total, getString(R.string.total_time, report.results.size, report.seconds))
        text(
            R.id.parts,
            getString(R.string.parts, report.decode.median, report.preprocess.median, report.run.median),
        )
        val backends = (about["backends"] as List<*>).joinToString().ifEmpty { getString(R.string.portable) }
        text(R.id.ran_by, getString(R.string.ran_by, backends))
        view<ChartView>(R.id.chart).show(report)
        text(R.id.health, health(report))
        text(R.id.saved, getString(R.string.saved, file.path))
        showTags(report)
    }

    private fun health(report: Report): String {
        val (first, last) = report.health.first().second to report.health.last().second
        fun change(a: String?, b: String?) =
            if (a == null || b == null) getString(R.string.unknown) else getString(R.string.health_change, a, b)
        fun percent(health: Health) = health.batteryPercent?.let { getString(R.string.percent, it) }
        fun heat(health: Health) = health.thermal?.let { getString(HEAT[it.coerceIn(0, 6)]) }
        return getString(
            R.string.health_line, change(percent(first), percent(last)), change(heat(first), heat(last)), report.throttling,
        )
    }

    private fun showTags(report: Report) {
        val list = view<LinearLayout>(R.id.tags)
        list.removeAllViews()
        for (photo in report.photos.take(ROWS)) {
            val row = layoutInflater.inflate(R.layout.row_photo, list, false)
            val tags = photo.tags(report.spec.classes, report.plan.threshold)
                .joinToString { getString(R.string.tag, it.name, 100 * it.probability) }
            row.findViewById<TextView>(R.id.row_tags).text = tags.ifEmpty { getString(R.string.no_tag) }
            row.findViewById<TextView>(R.id.row_about).text = getString(R.string.row_line, photo.name, photo.totalMs)
            list.addView(row)
        }
        if (report.photos.size > ROWS) {
            list.addView(TextView(this).apply { text = getString(R.string.more_rows, report.photos.size - ROWS) })
        }
    }

    private fun showFault(refusal: Refusal) {
        view<View>(R.id.fault_card).visibility = View.VISIBLE
        val words = resources.getIdentifier(refusal.fault.key, "string", packageName)
        text(R.id.fault, getString(words, refusal.detail))
    }

    /** Runs on a thread; a refusal becomes the sentence of the screen. */
    private fun work(finally: () -> Unit = {}, task: () -> Unit): Thread = Thread {
        try {
            task()
        } catch (e: Refusal) {
            runOnUiThread { showFault(e) }
        } catch (e: OutOfMemoryError) {
            runOnUiThread { showFault(Refusal(Fault.OUT_OF_MEMORY)) }
        } catch (e: IOException) {
            runOnUiThread { showFault(Refusal(Fault.NOT_SAVED, e.message.orEmpty())) }
        } catch (e: RuntimeException) {
            runOnUiThread { showFault(Refusal(Fault.RUN_FAILED, e.toString())) }
        } finally {
            runOnUiThread { finally() }
        }
    }.apply { start() }

    private fun text(id: Int, words: String) { view<TextView>(id).text = words }

    private fun <T : View> view(id: Int): T = findViewById(id)

    private companion object {
        const val PROGRAM = 1
        const val PHOTOS = 2
        const val ROWS = 200

        /** The last result, for a screen that Android makes again. */
        @Volatile var last: Triple<Report, Map<String, Any?>, File>? = null
        val HEAT = intArrayOf(
            R.string.heat_0, R.string.heat_1, R.string.heat_2, R.string.heat_3, R.string.heat_4, R.string.heat_5,
            R.string.heat_6,
        )
    }
}
