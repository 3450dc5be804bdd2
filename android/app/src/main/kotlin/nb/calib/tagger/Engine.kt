package nb.calib.tagger

/** How long and how often. */
class Plan(
    /** Runs on the first photo before anything is timed. */
    val warmup: Int = 5,
    /** Runs of the network on each photo; its time is their median. */
    val runs: Int = 3,
    /** The photos are repeated until so many seconds have passed; 0: each photo once. */
    val seconds: Int = 0,
    /** Least probability of a tag. */
    val threshold: Float = 0.5f,
)

/** Battery and heat at one moment; null where the phone does not tell. */
class Health(
    val batteryPercent: Int? = null,
    /** Microamperes; negative while the battery gives current on most phones. */
    val currentUa: Int? = null,
    val batteryCelsius: Float? = null,
    /** Android's thermal status: 0 none, 1 light, 2 moderate, 3 severe, 4 critical, 5 emergency, 6 shutdown. */
    val thermal: Int? = null,
) {
    fun toMap(): Map<String, Any?> = linkedMapOf(
        "battery_percent" to batteryPercent, "current_ua" to currentUa, "battery_celsius" to batteryCelsius,
        "thermal_status" to thermal,
    )
}

/** Reads battery and heat. */
fun interface Monitor {
    fun read(): Health
}

/** Runs a network over photos and measures: warm-up, then decode, preprocess and run of each photo apart. */
class Engine(
    private val net: Net,
    private val spec: TaggerSpec,
    private val monitor: Monitor = Monitor { Health() },
    private val clock: () -> Long = System::nanoTime,
) {
    private val preprocess = Preprocess(spec.size, spec.crop)

    /**
     * Measures. [progress] hears of each photo; [cancelled] is asked after each.
     * Throws [Refusal] when there is no photo that can be read, or the network fails.
     */
    fun benchmark(
        photos: List<Photo>, plan: Plan, progress: (Int, PhotoResult) -> Unit = { _, _ -> },
        cancelled: () -> Boolean = { false },
    ): Report {
        if (photos.isEmpty()) throw Refusal(Fault.NO_PHOTOS)
        val health = arrayListOf(0.0 to monitor.read())
        warmUp(photos, plan.warmup)
        val results = ArrayList<PhotoResult>()
        val unreadable = ArrayList<String>()
        val start = clock()
        var visits = 0
        do {
            for (photo in photos) {
                if (cancelled() || (results.size >= photos.size && seconds(start) >= plan.seconds)) break
                val at = seconds(start)
                val result = one(photo, plan, at, unreadable) ?: continue
                results.add(result)
                progress(++visits, result)
                if (at - health.last().first >= HEALTH_EVERY) health.add(at to monitor.read())
            }
        } while (!cancelled() && results.isNotEmpty() && seconds(start) < plan.seconds)
        if (results.isEmpty() && !cancelled()) throw Refusal(Fault.PHOTO_UNREADABLE, unreadable.first())
        val total = seconds(start)
        health.add(total to monitor.read())
        return Report(spec, plan, results, unreadable.distinct(), total, health)
    }

    private fun seconds(start: Long) = (clock() - start) / 1e9

    private fun warmUp(photos: List<Photo>, runs: Int) {
        val blank = Pixels(1, 1, intArrayOf(0))
        val input = preprocess.tensor(photos.firstNotNullOfOrNull { tryLoad(it) } ?: blank)
        repeat(runs) { guarded { net.run(input) } }
    }

    private fun tryLoad(photo: Photo): Pixels? = try {
        guarded { photo.load() }
    } catch (e: Refusal) {
        if (e.fault == Fault.PHOTO_UNREADABLE) null else throw e
    }

    private fun one(photo: Photo, plan: Plan, at: Double, unreadable: MutableList<String>): PhotoResult? {
        val begin = clock()
        val image = try {
            guarded { photo.load() }
        } catch (e: Refusal) {
            if (e.fault != Fault.PHOTO_UNREADABLE) throw e
            unreadable.add(photo.name)
            return null
        }
        val decoded = clock()
        val input = guarded { preprocess.tensor(image) }
        val prepared = clock()
        var scores = FloatArray(0)
        val times = DoubleArray(maxOf(1, plan.runs)) {
            val before = clock()
            scores = guarded { net.run(input) }
            (clock() - before) / 1e6
        }
        if (scores.size != spec.classes.size) {
            throw Refusal(Fault.LABELS_DIFFER, "${scores.size} scores, ${spec.classes.size} categories")
        }
        return PhotoResult(
            photo.name, at, (decoded - begin) / 1e6, (prepared - decoded) / 1e6, Numbers.quantile(times, 0.5), scores,
        )
    }

    private fun <T> guarded(work: () -> T): T = try {
        work()
    } catch (e: Refusal) {
        throw e
    } catch (e: OutOfMemoryError) {
        throw Refusal(Fault.OUT_OF_MEMORY, "", e)
    } catch (e: RuntimeException) {
        throw Refusal(Fault.RUN_FAILED, e.message ?: e.javaClass.simpleName, e)
    }

    private companion object {
        const val HEALTH_EVERY = 5.0 // seconds between two readings of battery and heat
    }
}
